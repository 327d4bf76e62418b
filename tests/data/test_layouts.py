"""Rows to conversations: what is accepted, and that every fault is named at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.chat import Template
from veneer.data.encode import encode
from veneer.data.files import read_rows
from veneer.data.layouts import conversation, renamed
from veneer.data.preview import runs
from veneer.errors import DataError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["prompt", "completion", "messages", "instruction", "input", "output", "references", "tools"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "robot"]), "content": JSON_VALUES})
)


def refusal(row: dict[str, object]) -> str:
    with pytest.raises(DataError) as caught:
        conversation(row, "rows.jsonl, row 7")
    assert str(caught.value).startswith("rows.jsonl, row 7 ")
    return str(caught.value)


def test_prompt_and_completion():
    found = conversation({"id": 1, "prompt": "2+2", "completion": "4"}, "row")
    assert found.messages == ({"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"})
    assert found.references == ("4",)
    assert found.trained_turns() == [1]


@pytest.mark.parametrize(
    ("fields", "user"),
    [
        ({"instruction": "Add.", "prompt": "2+2", "completion": "4"}, "Add.\n\n2+2"),
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, "Add.\n\n2+2"),
        ({"instruction": "Add 2 and 2.", "input": "", "output": "4"}, "Add 2 and 2."),
        (
            {"instruction": "Add.", "input": "Small ones.", "prompt": "2+2", "completion": "4"},
            "Add.\n\nSmall ones.\n\n2+2",
        ),
        ({"instruction": "", "prompt": "2+2", "completion": "4"}, "2+2"),
        ({"input": "unrelated", "prompt": "2+2", "completion": "4"}, "2+2"),
    ],
)
def test_an_instruction_stands_before_the_prompt(fields, user):
    assert [message["content"] for message in conversation(fields, "row").messages] == [user, "4"]


def test_conversational_prompts_train_the_completion_alone():
    prompt = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    found = conversation({"prompt": prompt, "completion": [{"role": "assistant", "content": "yes"}]}, "row")
    assert len(found.messages) == 5
    assert found.trained_turns() == [4]


def test_messages_train_every_reply_and_end_with_one():
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant", "user")]
    found = conversation({"messages": turns}, "row")
    assert found.messages == tuple(turns[:4])
    assert found.trained_turns() == [1, 3]
    assert found.references == ("assistant",)


def test_text_parts_are_joined_and_other_keys_kept():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = conversation({"messages": [{"role": "user", "content": parts, "name": "Eva"}, REPLY]}, "row")
    assert found.messages[0] == {"role": "user", "content": "ab", "name": "Eva"}


def test_references_are_the_rows_own():
    assert conversation({"prompt": "a", "completion": "b", "references": ["b", "c"]}, "row").references == ("b", "c")


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PAIRED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}
# layout -> a row of it, what is trained on of it, and what is said of it
LAYOUTS = {
    "prompt-completion": ({"prompt": "q", "completion": "a"}, ["a"], ""),
    "prompt-completion-messages": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, ["a"], ""),
    "messages": ({"messages": TURNS + TURNS}, ["a", "a"], ""),
    "messages-train-false": ({"messages": [TURNS[0], {**TURNS[1], "train": False}, *PAIRED]}, ["b"], "not trained on"),
    "messages-weight-0": ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *PAIRED]}, ["b"], "not trained on"),
    "messages-tools": ({"messages": TURNS, "tools": [SCHEMA]}, ["a"], "handed to the chat template"),
    "alpaca": ({"instruction": "q", "input": "i", "output": "a"}, ["a"], "stands before the prompt"),
    "dolly": ({"instruction": "q", "context": "c", "response": "a"}, ["a"], "`response` is the completion"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ["a"],
        "`conversations` are read as messages",
    ),
    "question-answer": ({"question": "q", "answer": "a"}, ["a"], "`question` is the prompt"),
    "text": ({"text": "one two"}, None, "`text` is trained on as it stands"),
    "preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["a", "b"], "preference pairs"),
    "preference-messages": ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": PAIRED[1:]}, ["a", "b"], "pairs"),
    "preference-implicit": ({"chosen": TURNS, "rejected": PAIRED}, ["a", "b"], "preference pairs"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_found_by_themselves_and_said(tokenizer_of, layout):
    row, trained, said = LAYOUTS[layout]
    tokenizer = tokenizer_of("tools")
    found = encode([row], Template(tokenizer), 1000, "rows.jsonl")
    assert said in "; ".join(found.notes) and bool(said) == bool(found.notes)
    runs_of = [[text for text, on in runs(example, tokenizer) if on] for example in found.examples]
    if trained is None:
        assert runs_of == [[tokenizer.decode(found.examples[0].input_ids[1:])]]
    else:
        assert [text for one in runs_of for text in one] == [f"{text}<|im_end|>" for text in trained]


REPLY = {"role": "assistant", "content": "yes"}
USER = {"role": "user", "content": "really?"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "has no fields"),
        ({"text": "a", "title": "b"}, "has the fields 'text', 'title'"),
        ({"prompt": "a"}, "has the fields 'prompt'"),
        ({"prompt": "a", "completion": ""}, "`completion` is empty"),
        ({"prompt": "a", "completion": " \n"}, "`completion` is empty"),
        ({"prompt": "a", "completion": 4}, "`completion` is a number, wanted text or a list of messages"),
        ({"prompt": None, "completion": "b"}, "`prompt` is null"),
        ({"prompt": "a", "completion": [REPLY, REPLY]}, "`completion` is not one assistant's message"),
        ({"prompt": "a", "completion": USER}, "`completion` is not one assistant's message"),
        ({"instruction": "a", "prompt": [USER], "completion": "b"}, "wanted as text where one stands before another"),
        ({"prompt": "a", "completion": "b", "messages": [USER, REPLY]}, "has both `messages` and `completion`"),
        ({"prompt": "a", "completion": "b", "references": "b"}, "`references` is text, wanted a list"),
        ({"prompt": "a", "completion": "b", "references": []}, "`references` is an empty list"),
        ({"prompt": "a\ud800", "completion": "b"}, "`prompt` holds text, wanted valid Unicode text"),
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": "hello"}, "`messages` is text, wanted a list of messages"),
        ({"messages": ["hello"]}, r"`messages[0]` is text, wanted an object with `role` and `content`"),
        ({"messages": [USER]}, "`messages` has no assistant's turn"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "`messages[1]` is empty"),
        ({"messages": [USER, {**REPLY, "train": "no"}]}, "`messages[1]` has `train` 'no', wanted true or false"),
        ({"messages": [{**USER, "train": True}, REPLY]}, "true for an assistant's turn only"),
        ({"messages": [USER, {**REPLY, "weight": 0.5}]}, "`messages[1]` has `weight` 0.5, wanted 0 (not trained on)"),
        ({"messages": [USER, {**REPLY, "weight": 0}]}, "`messages` trains no assistant's turn"),
        ({"prompt": "a", "completion": [{**REPLY, "train": False}]}, "`completion` trains no assistant's turn"),
        ({"messages": [{**USER, "tool_calls": [{"name": "f"}]}, REPLY]}, "`tool_calls`, which only an assistant makes"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": ["f"]}]},
            "`messages[1].tool_calls` is a list",
        ),
        (
            {"messages": [USER, {"role": "tool_call", "content": "f()"}]},
            "`messages[1].tool_calls` is text",
        ),
        ({"messages": [USER, {"role": "assistent", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]}, "`messages[0]` holds a list"),
        ({"messages": [USER, REPLY], "tools": '[{"title": "f"}]'}, "`tools` is a list of other things, wanted a list"),
        ({"messages": [USER, REPLY], "tools": "f"}, "`tools` is text, wanted a list of JSON schemas"),
    ],
)
def test_what_cannot_be_used_is_named(row, said):
    assert said in refusal(row)


def test_all_faults_of_a_row_are_in_one_message():
    message = refusal({"messages": [{"role": "robot", "content": 1}, {"role": "user"}, REPLY], "tools": [{}]})
    assert message.count("\n  - ") == 4


@given(row=st.dictionaries(FIELDS, JSON_VALUES | MESSAGES, max_size=5))
def test_any_row_is_a_conversation_or_one_data_error(row):
    try:
        found = conversation(row, "row")
    except DataError:
        return
    assert found.messages[-1]["role"] == "assistant"
    assert found.messages[-1]["content"].strip()
    assert found.references
    assert found.trained_turns()[-1] == len(found.messages) - 1


@pytest.mark.parametrize(
    "name", ["multitask/number_to_words/test.jsonl", "e2e_nlg/dev.jsonl", "instruct/alpaca_test.jsonl"]
)
def test_real_files(shared_data, name):
    rows = read_rows(Path(shared_data) / name)
    found = [conversation(row, f"{name}, row {i + 1}") for i, row in enumerate(rows)]
    assert len(found) >= 100
    for row, conv in zip(rows, found, strict=True):
        assert list(conv.references) == row.get("references", [conv.messages[-1]["content"]])


@pytest.mark.parametrize(
    ("row", "user", "reply"),
    [
        ({"question": "2+2", "answer": "4"}, "2+2", "4"),
        ({"query": "2+2", "response": "4"}, "2+2", "4"),
        ({"Question": "2+2", "ANSWER": "4"}, "2+2", "4"),
        ({"Prompt": "2+2", "Completion": "4"}, "2+2", "4"),
        ({"input": "2+2", "output": "4"}, "2+2", "4"),
        ({"dialogue": "A: hi", "summary": "A greets."}, "A: hi", "A greets."),
        ({"instruction": "Add.", "context": "", "response": "4", "category": "qa"}, "Add.", "4"),
        ({"instruction": "Add.", "context": "2+2", "response": "4"}, "Add.\n\n2+2", "4"),
    ],
)
def test_columns_of_other_names_are_prompt_and_completion_and_it_is_said(row, user, reply):
    found = conversation(row, "row")
    assert [message["content"] for message in found.messages] == [user, reply] and found.trained_turns() == [1]
    assert "completion" in (renamed(row)[1] or "")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "question": "c", "answer": "d"},
        {"instruction": "a", "output": "b", "response": "c"},
        {"messages": [USER, REPLY], "conversations": []},
    ],
)
def test_our_own_names_go_before_others(row):
    assert renamed(row) == (row, None)


def test_sharegpt_conversations_are_messages():
    turns = [("system", "s"), ("human", "q"), ("function_call", "{}"), ("observation", "1"), ("gpt", "a")]
    row = {"conversations": [{"from": role, "value": text, "weight": 1} for role, text in turns]}
    found = conversation(row, "row")
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert [(m["role"], m["content"], m["weight"]) for m in found.messages] == [
        (role, text, 1) for role, (_, text) in zip(roles, turns, strict=True)
    ]
    assert found.trained_turns() == [2, 4]
    for broken in ([{"from": "alien", "value": "x"}], [{"value": "x"}], ["x"], [{"from": ["a"], "value": "x"}]):
        assert "`messages[0]`" in refusal({"conversations": [*broken, {"from": "gpt", "value": "a"}]})
