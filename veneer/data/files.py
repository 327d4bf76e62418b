"""Data files to rows, by kind of file: the table KINDS."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from veneer.errors import DataError, listed, nearest

Row = dict[str, Any]
Read = TypeVar("Read")
SHOWN = 5  # faults named one by one in a message; the rest is counted
# Columns of a table whose cells are JSON where they look like it.
_NESTED = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "references", "tools", "choices")
_DELIMITERS = ",;\t|"


class Content(NamedTuple):
    """What a file holds: rows, where each stands in the file, and what is wrong with some of them."""

    rows: list[Row]
    faults: list[str]


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a data file, in file order: JSON Lines, JSON, CSV, TSV, Parquet or text, told by the file's suffix.

    Raises DataError where the file is missing, a folder, of another kind, empty, or has rows that cannot be read; all
    such rows are counted and the first few named.
    """
    file = _checked(Path(path))
    kind = KINDS[file.suffix.lower()]
    rows, faults = kind.read(_bytes(file))
    if faults:
        headline = f"{file}: {len(faults):,} of {len(rows) + len(faults):,} {kind.unit}s cannot be read:"
        raise DataError(listed(headline, shortened(faults), kind.wanted))
    if not rows:
        raise DataError(f"{file} is empty: it has no rows. {kind.wanted}")
    return rows


def read_each(
    rows: Sequence[Mapping[str, Any]],
    read: Callable[[Mapping[str, Any], list[str]], Read | None],
    faults: dict[int, str],
) -> dict[int, Read]:
    """What `read` makes of each row, by its index; of a row of which it makes None, its reasons go into `faults`."""
    found = {}
    for index, row in enumerate(rows):
        reasons: list[str] = []
        made = read(row, reasons)
        if made is None:
            faults[index] = "; ".join(reasons)
        else:
            found[index] = made
    return found


def shortened(faults: list[str], shown: int = SHOWN) -> list[str]:
    """The first faults and the count of the others."""
    rest = len(faults) - shown
    return faults[:shown] + ([f"and {rest:,} more"] if rest > 0 else [])


def by_fault(faults: Mapping[int, str]) -> list[str]:
    """A line for each fault, with the rows that have it, counted from 1: alike ones are told once."""
    alike: dict[str, list[str]] = {}
    for index in sorted(faults):
        alike.setdefault(faults[index], []).append(str(index + 1))
    lines = []
    for fault, rows in alike.items():
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        lines.append(f"row{'s' * (len(rows) > 1)} {', '.join(rows[:SHOWN])}{more}: {fault}")
    return shortened(lines)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {"NoneType": "null", "bool": "a truth value", "int": "a number", "float": "a number"}
    names |= {"str": "text", "list": "a list" if value else "an empty list", "dict": "an object"}
    return names.get(type(value).__name__, type(value).__name__)


def without_nulls(value: Any) -> Any:
    """The value without the fields that are null in objects inside it: Arrow gives every object of a column the
    fields of all of them. Columns of a row stay."""
    if isinstance(value, list):
        return [_pruned(row) if not isinstance(row, dict) else {k: _pruned(v) for k, v in row.items()} for row in value]
    return value


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(part) for name, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value


def _checked(file: Path) -> Path:
    wanted = f"Wanted: a file of kind {', '.join(KINDS)}."
    if file.is_dir():
        found = sorted(entry.name for entry in file.iterdir() if entry.suffix.lower() in KINDS)
        inside = f" It holds {', '.join(found[:SHOWN])}." if found else ""
        raise DataError(f"{file} is a folder, not a data file.{inside} {wanted}")
    if not file.exists():
        raise DataError(f"{file} does not exist.{_alternatives(file)} {wanted}")
    if file.suffix.lower() not in KINDS:
        kind = f"of kind {file.suffix!r}" if file.suffix else "without a suffix"
        raise DataError(f"{file} is a file {kind}, which is not read. {wanted}")
    return file


def _alternatives(file: Path) -> str:
    if not file.parent.is_dir():
        return f" Neither does the folder {file.parent}."
    near = nearest(file.name, (entry.name for entry in file.parent.iterdir()))
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors write a byte order mark
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error


def json_lines(content: bytes) -> Content:
    """One object on each line; blank lines are skipped."""
    rows: list[Row] = []
    faults: list[str] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            row, fault = _parsed(line)
            if fault or not isinstance(row, dict):
                faults.append(f"line {number}: {fault or f'got {kind_of(row)}, wanted an object'}")
            else:
                rows.append(row)
    return Content(rows, faults)


def json_array(content: bytes) -> Content:
    """A list of objects, or an object that holds one list of them; what is JSON Lines all the same is read as that."""
    value, fault = _parsed(content)
    if fault:
        lines = json_lines(content)
        return lines if len(lines.rows) > 1 and not lines.faults else Content([], [fault])
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        return Content([], [f"got {kind_of(value)}, wanted a list of objects"])
    faults = [
        f"item {number}: got {kind_of(row)}, wanted an object"
        for number, row in enumerate(value, start=1)
        if not isinstance(row, dict)
    ]
    return Content([row for row in value if isinstance(row, dict)], faults)


def table(content: bytes, delimiter: str | None = None) -> Content:
    """A line of column names, then rows of text; the delimiter is the one of `,;|` and tab that the first line has
    most of. Cells that hold JSON, in columns that may, are parsed."""
    text, fault = _decoded(content)
    if fault:
        return Content([], [fault])
    first = text.partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter or max(_DELIMITERS, key=first.count), strict=True
    )
    rows: list[Row] = []
    faults: list[str] = []
    names: list[str] = []
    for number, cells, fault in _cells(reader):
        if fault:
            faults.append(f"line {number}: {fault}")
        elif not names:
            names = [name.strip() for name in cells]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                return Content([], [f"line {number}: columns named twice: {', '.join(map(repr, twice))}"])
        elif len(cells) != len(names):
            faults.append(f"line {number}: {len(cells)} cells beside {len(names)} columns; is a quote missing?")
        else:
            rows.append({name: _cell(name, cell) for name, cell in zip(names, cells, strict=True) if name})
    return Content(rows, faults)


def tab_separated(content: bytes) -> Content:
    """`table` with tabs."""
    return table(content, "\t")


def parquet(content: bytes) -> Content:
    """Apache Parquet, through pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("a Parquet file needs pyarrow; next: pip install pyarrow") from error
    try:
        return Content(without_nulls(pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()), [])
    except (pyarrow.ArrowException, OSError) as error:
        return Content([], [f"broken: {str(error).splitlines()[0]}"])


def plain_text(content: bytes) -> Content:
    """One row, with the whole file as its `text`."""
    text, fault = _decoded(content)
    return Content([{"text": text}] if text.strip() else [], [fault] if fault else [])


class Kind(NamedTuple):
    """One kind of file."""

    read: Callable[[bytes], Content]
    unit: str  # what its faults count
    wanted: str


_LINES = Kind(json_lines, "line", "Wanted: UTF-8 with one JSON object on each line.")
# suffix -> how such a file is read
KINDS: dict[str, Kind] = {
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".json": Kind(json_array, "item", "Wanted: a list of JSON objects, or one object on each line."),
    ".csv": Kind(table, "line", "Wanted: UTF-8, column names in the first line, a row in each of the others."),
    ".tsv": Kind(tab_separated, "line", "Wanted: UTF-8, column names in the first line, cells apart by tabs."),
    ".parquet": Kind(parquet, "file", "Wanted: an Apache Parquet file with a row for each example."),
    ".txt": Kind(plain_text, "file", "Wanted: UTF-8 text, one document, to train on as it stands."),
}


def _decoded(content: bytes) -> tuple[str, str]:
    """The text and an empty string, or nothing and what is wrong."""
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return "", f"line {line}: not UTF-8: byte 0x{content[error.start]:02x}; save the file as UTF-8"


def _cells(reader: Any) -> Iterator[tuple[int, list[str], str]]:
    """Line number, cells and fault of each line that is not blank."""
    csv.field_size_limit(2**31 - 1)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, [], str(error)
            continue
        if cells:
            yield number, cells, ""


def _cell(name: str, text: str) -> Any:
    if name not in _NESTED or text.strip()[:1] not in ("[", "{"):
        return text
    value, fault = _parsed(text.encode("utf-8", "surrogatepass"))
    return text if fault else value


def _parsed(text: bytes) -> tuple[Any, str]:
    """A JSON value and an empty string, or nothing and what is wrong with it."""
    try:
        return json.loads(text.decode("utf-8")), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: byte 0x{text[error.start]:02x} at position {error.start + 1}"
    except json.JSONDecodeError as error:  # its own words count lines from the start of the text, here often one line
        where = f"line {error.lineno}, column {error.colno}" if b"\n" in text else f"column {error.colno}"
        return None, f"broken JSON: {error.msg.removesuffix(' starting at')}, at {where}"
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits
        return None, f"broken JSON: {error}"
