"""Reading files and rows: what is accepted, and that every fault is named at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.sources import conversation, read_rows
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


def written(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def refusal(row: dict[str, object]) -> str:
    with pytest.raises(DataError) as caught:
        conversation(row, "rows.jsonl, row 7")
    assert str(caught.value).startswith("rows.jsonl, row 7 ")
    return str(caught.value)


@given(
    rows=st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=5), escaped=st.booleans()
)
def test_what_json_writes_is_read_back(tmp_path_factory, rows, escaped):
    text = "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    encoded = text.encode("utf-8", "surrogatepass")
    if b"\xed\xa0" not in encoded and _is_utf8(encoded):
        assert read_rows(written(tmp_path_factory.mktemp("rows"), encoded)) == rows


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_line_ends_blank_lines_and_byte_order_mark(tmp_path):
    content = b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8y"}\r\n\n  \n{"a": 2}'  # U+2028 ends no line
    assert read_rows(written(tmp_path, content)) == [{"a": "x\u2028y"}, {"a": 2}]


def test_all_broken_lines_are_counted_and_the_first_named_by_number(tmp_path):
    content = b'{"a": 1}\n\n{"a": \n[1]\nnull\n\xff\n' + b"x\n" * 4
    with pytest.raises(DataError) as caught:
        read_rows(written(tmp_path, content))
    message = str(caught.value)
    assert "8 of 9 lines" in message
    assert "line 3: broken JSON" in message
    assert "line 4: got a list, wanted an object" in message
    assert "line 5: got null" in message
    assert "line 6: not UTF-8: byte 0xff at position 1" in message
    assert "line 8" not in message
    assert "and 3 more" in message


@pytest.mark.parametrize("line", [b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_json_that_python_gives_up_on_is_broken_json(tmp_path, line):
    with pytest.raises(DataError, match="line 1: broken JSON"):
        read_rows(written(tmp_path, line))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"rows\.jsonl is empty: it has no rows"):
        read_rows(written(tmp_path, content))


def test_a_missing_file_names_its_neighbours(tmp_path):
    written(tmp_path, b"{}", "train.jsonl")
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist\. Did you mean train\.jsonl\?"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="Neither does the folder"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_says_what_it_holds(tmp_path):
    written(tmp_path, b"{}", "train.jsonl")
    with pytest.raises(DataError, match=r"is a folder, not a data file\. It holds train\.jsonl\."):
        read_rows(tmp_path)


@pytest.mark.parametrize(("name", "said"), [("rows.csv", r"of kind '\.csv'"), ("rows", "without a suffix")])
def test_other_kinds_of_file_are_refused(tmp_path, name, said):
    with pytest.raises(DataError, match=said):
        read_rows(written(tmp_path, b"{}", name))


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
        ({"messages": [USER, {"role": "assistent", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]}, "`messages[0]` holds a list"),
        ({"messages": [USER, REPLY], "tools": '[{"name": "f"}]'}, "`tools` is not handed to the chat template"),
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
