"""Reading data files of every kind: what was written comes back, and every fault is named at once."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.files import KINDS, read_rows
from veneer.errors import DataError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def written(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


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
    assert "line 3: broken JSON" in message and "line 1" not in message
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


@pytest.mark.parametrize(("name", "said"), [("rows.xlsx", r"of kind '\.xlsx'"), ("rows", "without a suffix")])
def test_other_kinds_of_file_are_refused(tmp_path, name, said):
    with pytest.raises(DataError, match=said):
        read_rows(written(tmp_path, b"{}", name))


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)
NAMES = st.lists(st.sampled_from(["prompt", "completion", "a, b", 'q"', "x"]), min_size=1, max_size=4, unique=True)


@given(names=NAMES, data=st.data(), delimiter=st.sampled_from([",", ";", "\t", "|"]))
def test_what_csv_writes_is_read_back(tmp_path_factory, names, data, delimiter):
    rows = data.draw(
        st.lists(st.tuples(*[TEXT.filter(lambda t: t.strip()[:1] not in ("[", "{"))] * len(names)), min_size=1)
    )
    memory = io.StringIO(newline="")
    csv.writer(memory, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    name = "rows.tsv" if delimiter == "\t" else "rows.csv"
    written_first = memory.getvalue().partition("\n")[0]
    if delimiter == "\t" or written_first.count(delimiter) > max(
        written_first.count(d) for d in ",;|\t" if d != delimiter
    ):
        found = read_rows(written(tmp_path_factory.mktemp("rows"), memory.getvalue().encode(), name))
        assert found == [dict(zip(names, row, strict=True)) for row in rows]


@given(rows=st.lists(st.dictionaries(TEXT, JSON_VALUES, max_size=4), min_size=1, max_size=5))
def test_a_list_an_object_around_it_and_lines_are_json(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    texts = [json.dumps(rows)]
    if all(rows):
        texts.append(json.dumps({"version": 1, "data": rows}))
    if len(rows) > 1:
        texts.append("\n".join(map(json.dumps, rows)))
    for text in texts:
        assert read_rows(written(folder, text.encode(), "rows.json")) == rows


def test_parquet_with_messages(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 1}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == rows


def test_json_in_the_cells_of_a_table(tmp_path):
    messages = json.dumps([{"role": "user", "content": "a"}])
    memory = io.StringIO(newline="")
    csv.writer(memory).writerows([["messages", "note"], [messages, "[1]"], ["[broken", "x"]])
    found = read_rows(written(tmp_path, memory.getvalue().encode(), "rows.csv"))
    assert found == [{"messages": json.loads(messages), "note": "[1]"}, {"messages": "[broken", "note": "x"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", b"a,b\n1,2\n3\n4,5,6\n", ["2 of 3 lines", "line 3: 1 cells beside 2 columns", "line 4: 3 cells"]),
        ("rows.csv", b"a,a\n1,2\n", ["columns named twice: 'a'"]),
        ("rows.csv", b"a,b\n1,caf\xe9\n", ["line 2: not UTF-8: byte 0xe9", "save the file as UTF-8"]),
        ("rows.csv", b'a,b\n1,"2\n', ["unexpected end of data"]),
        ("rows.csv", b"a,b\n", ["is empty: it has no rows"]),
        ("rows.csv", b"", ["is empty: it has no rows"]),
        ("rows.json", b"[1, {}]", ["item 1: got a number, wanted an object"]),
        ("rows.json", b'"text"', ["got text, wanted a list of objects"]),
        ("rows.json", b"[{]", ["broken JSON"]),
        ("rows.json", b'[{"a": 1}', ["broken JSON"]),
        ("rows.parquet", b"PAR1", ["broken"]),
    ],
)
def test_faults_of_other_kinds_are_named(tmp_path, name, content, said):
    with pytest.raises(DataError) as caught:
        read_rows(written(tmp_path, content, name))
    assert all(part in str(caught.value) for part in said), str(caught.value)


@given(content=st.binary(max_size=40), suffix=st.sampled_from(list(KINDS)))
def test_any_bytes_are_rows_or_one_data_error(tmp_path_factory, content, suffix):
    try:
        found = read_rows(written(tmp_path_factory.mktemp("rows"), content, f"rows{suffix}"))
    except DataError:
        return
    assert found and all(isinstance(row, dict) for row in found)
