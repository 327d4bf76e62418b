"""Tools: schemas, calls and results reach the text and the mask, or the row is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.data.chat import Template, conversation, encode_rows
from veneer.data.files import read_rows
from veneer.data.preview import runs
from veneer.data.tools import read_calls, read_tools
from veneer.errors import DataError

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
SCHEMA = {"type": "function", "function": ADD}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = '<call>{"name": "add", "arguments": {"a": 1}}</call>'
USER, REPLY = {"role": "user", "content": "1+0?"}, {"role": "assistant", "content": "one"}
RESULT = {"role": "tool", "content": "1"}
TURNS = [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, REPLY]


def trained(row, tokenizer):
    example = encode_rows([row], Template(tokenizer), 5000, "rows").examples[0]
    return [text for text, on in runs(example, tokenizer) if on], tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(
    "turns",
    [
        TURNS,
        [USER, {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "x"}]}, RESULT, REPLY],
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]}, RESULT, REPLY],
        [USER, {"role": "assistant", "tool_calls": json.dumps([CALL])}, RESULT, REPLY],
        [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
            RESULT,
            REPLY,
        ],
        [USER, {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'}, RESULT, REPLY],
    ],
)
@pytest.mark.parametrize("tools", [[SCHEMA], [ADD], json.dumps([SCHEMA])])
def test_every_spelling_of_tools_and_calls_is_the_same_text(tokenizer_of, turns, tools):
    tokenizer = tokenizer_of("tools")
    found, text = trained({"messages": turns, "tools": tools}, tokenizer)
    assert found == [f"{CALLED}<|im_end|>", "one<|im_end|>"]
    assert json.dumps(SCHEMA) in text and "<|im_start|>tool\n1<|im_end|>" in text


def test_sharegpts_function_calls_are_calls_where_the_row_has_tools(tokenizer_of):
    turns = [("human", "1+0?"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", "1")]
    row = {"conversations": [{"from": role, "value": text} for role, text in [*turns, ("gpt", "one")]]}
    with_tools, _ = trained({**row, "tools": json.dumps([ADD])}, tokenizer_of("tools"))
    without, _ = trained(row, tokenizer_of("tools"))
    assert with_tools == [f"{CALLED}<|im_end|>", "one<|im_end|>"]
    assert without == ['{"name": "add", "arguments": {"a": 1}}<|im_end|>', "one<|im_end|>"]


def test_calls_one_after_another_are_one_turn(tokenizer_of):
    call = {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1}}'}
    found, _ = trained({"messages": [USER, call, call, RESULT, RESULT, REPLY], "tools": [ADD]}, tokenizer_of("tools"))
    assert found == [f"{CALLED}{CALLED}<|im_end|>", "one<|im_end|>"]


@pytest.mark.parametrize("last", [3, 2])  # a row that ends with an answer, and one that ends with a call
def test_generation_starts_from_the_tools_too(tokenizer_of, last):
    tokenizer = tokenizer_of("tools")
    row = {"messages": TURNS[: last + 1] if last == 3 else TURNS[:2], "tools": [SCHEMA]}
    conv, template = conversation(row, "row"), Template(tokenizer)
    prompt, whole = template.prompt_ids(conv), encode_rows([row], template, 5000, "rows").examples[0].input_ids
    assert list(whole[: len(prompt)]) == prompt
    assert json.dumps(SCHEMA) in tokenizer.decode(prompt)
    assert template.reply(conv) == ("one" if last == 3 else CALLED)
    assert conv.references == (("one",) if last == 3 else ())


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        ("chatml", {"messages": [USER, REPLY], "tools": [SCHEMA]}, "leaves out `tools`;"),
        ("none", {"prompt": "a", "completion": "b", "tools": [SCHEMA]}, "leaves out `tools`;"),
        ("chatml", {"messages": TURNS}, "leaves out `tool_calls`;"),
        ("forgetful", {"messages": [USER, RESULT, REPLY]}, "leaves out messages of the role `tool`;"),
        ("forgetful", {"messages": TURNS, "tools": [SCHEMA]}, "leaves out `tools` and `tool_calls` and messages of"),
    ],
)
def test_a_template_that_passes_over_tools_is_refused(tokenizer_of, template, row, said):
    one = Template(tokenizer_of(template))
    with pytest.raises(DataError) as caught:
        encode_rows([row], one, 5000, "rows")
    assert said in str(caught.value) and "take a base whose template knows tools" in str(caught.value)
    with pytest.raises(DataError, match="leaves out"):
        one.prompt_ids(conversation(row, "row"))


@pytest.mark.parametrize("nothing", [None, "", "[]", []])
def test_no_tools_are_none(chatml, nothing):
    assert read_tools(nothing, []) == () and read_calls(nothing or None, "f", []) == []
    assert trained({"messages": [USER, REPLY], "tools": nothing}, chatml)[0] == ["one<|im_end|>"]


@pytest.mark.parametrize("value", ["f", 3, ["f"], [{"name": 3}], [{"function": []}], [{"name": "f", "arguments": "x"}]])
def test_what_is_no_call_is_a_fault(value):
    faults: list[str] = []
    read_calls(value, "messages[1].tool_calls", faults)
    assert len(faults) == 1 and faults[0].startswith("`messages[1].tool_calls` is ")


def test_real_conversations(shared_data, tokenizer_of):
    rows = read_rows(Path(shared_data) / "toolcall" / "conversations.jsonl")[:40]
    found = encode_rows(rows, Template(tokenizer_of("tools")), 50_000, "conversations")
    assert len(found.examples) == len(rows)
    with_tools = sum(row["tools"] not in ("", "[]") for row in rows)
    assert f"`tools` are handed to the chat template in {with_tools:,} rows" in found.notes
