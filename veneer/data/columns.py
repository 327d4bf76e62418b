"""Columns by the names that their owner gave them: `--columns prompt=Question,completion=Answer`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.data.files import Row, shortened
from veneer.errors import DataError, nearest


def with_columns(rows: Sequence[Row], columns: Mapping[Any, str], path: str) -> list[Row]:
    """The rows with each of our names (the keys) for what stands in the column named; `path` is for messages.

    Where `text` is named, nothing else of a row is kept. Raises DataError for a column that no row has.
    """
    known = list(dict.fromkeys(name for row in rows for name in row))
    missing = [name for name in columns.values() if name not in known]
    if missing:
        near = [match for name in missing for match in nearest(name, known, limit=1)]
        meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise DataError(
            f"{path} has no column {' or '.join(map(repr, missing))}.{meant} Its columns are "
            f"{', '.join(shortened([repr(name) for name in known], 20))}."
        )
    return [_row(row, columns) for row in rows]


def _row(row: Row, columns: Mapping[Any, str]) -> Row:
    named = {ours: _value(ours, row[theirs]) for ours, theirs in columns.items() if theirs in row}
    if "text" in columns:
        return named
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return {**rest, **named}


def _value(ours: str, value: Any) -> Any:
    """Messages may be JSON in a cell of a table."""
    if ours != "messages" or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
