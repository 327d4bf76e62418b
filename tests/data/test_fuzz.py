"""Damaged data files: rows or a DataError, soon. `make fuzz` tries many more."""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from veneer.data.chat import conversation
from veneer.data.files import KINDS, read_rows
from veneer.errors import DataError

JSON = b'{"prompt": "2 + 2 =", "completion": "4"}\n{"messages": [{"role": "user", "content": "a"}]}\n'
TABLE = b'prompt,completion\n"a, ""b""",c\n"[{""role"": ""user""}]",d\n'
PIECES = [
    b'"',
    b"'",
    b",",
    b"\t",
    b";",
    b"\n",
    b"\r",
    b"\0",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"null",
    b"NaN",
    b"1e999",
    b"\xff",
]
PIECES += [
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"9" * 5000,
    b"[" * 3000,
    b'"\\ud800"',
    b'"messages"',
    b"PAR1",
    b"\xff" * 8,
]


def good() -> dict[str, bytes]:
    files = dict.fromkeys(KINDS, JSON) | {".csv": TABLE, ".tsv": TABLE.replace(b",", b"\t")}
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": [["c"], None]}), out)
    return files | {".parquet": out.getvalue()}


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(whole))), draw(st.sampled_from([0, 0, 1, 4, 30]))
        whole = whole[:at] + draw(st.sampled_from(PIECES) | st.binary(max_size=4)) + whole[at + length :]
    return whole


@example(".json", b"[" * 100_000)
@example(".csv", b'"' + b"a" * 200_000)
@given(st.sampled_from(sorted(KINDS)), st.data() | st.binary(max_size=60))
def test_fuzz_a_data_file_is_rows_or_a_data_error(suffix, content):
    if not isinstance(content, bytes):
        content = content.draw(damaged(good()[suffix]))
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"data{suffix}"
        file.write_bytes(content)
        try:
            rows = read_rows(file)
        except DataError as error:
            rows, text = [], str(error)
            assert_short(text)
        for row in rows:
            assert isinstance(row, dict)
            try:
                conversation(row, "row 1")
            except DataError as error:
                assert_short(str(error))
    assert time.process_time() - started < 10


def assert_short(text: str) -> None:
    assert 0 < len(text) < 20_000
