"""Where a verb writes: results on standard output, everything else on standard error.

While a verb runs, `print` goes to standard error (`results_only`), so that no library can spoil the results.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Literal

from veneer.notes import Note

_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_results: list[IO[str]] = []
_LINES = {"warnings": "warning", "notes": "note"}  # facts that are sentences -> how each begins


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Inside, only `results()` reaches standard output."""
    _results.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.pop()


@contextlib.contextmanager
def notes_told() -> Iterator[None]:
    """Inside, what veneer warns of is a line for the person; other packages' warnings stay as they are."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Note):
            say(f"note: {message}")
        else:
            before(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def write_anything() -> None:
    """A letter that the terminal cannot show, or half a letter from a model, is escaped instead of ending the verb."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def results() -> IO[str]:
    """The stream that carries results."""
    return _results[-1] if _results else sys.stdout


def say(text: str) -> None:
    """A line for the person: standard error. Codes that move a terminal's cursor, which a file may hold, are shown."""
    print(_CODES.sub(lambda code: ascii(code[0])[1:-1], text), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object on one line of the results. NaN and infinity, which JSON lacks, become null."""
    # Escapes of `write_anything` are JSON up to U+FFFF only; a stream that is not Unicode gets JSON's own.
    ascii_only = not (getattr(results(), "encoding", None) or "utf-8").lower().startswith("utf")
    text = json.dumps(_finite(value), ensure_ascii=ascii_only, allow_nan=False, default=str)
    print(text, file=results(), flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, json: bool) -> None:
    """A table, numbers to the right: a result for people, so on standard error where JSON is the result."""
    _print_table(title, columns, rows, "right", json)


def print_facts(title: str, facts: Mapping[str, Any], *, json: bool) -> None:
    """Facts as a table of name and value. An object or a list of objects among them is a table of its own, warnings and
    notes are lines on standard error."""
    inner = {name: value for name, value in facts.items() if value and (isinstance(value, Mapping) or _is_rows(value))}
    plain = [_row(name, value) for name, value in facts.items() if name not in inner and name not in _LINES]
    _print_table(title, ("", ""), plain, "left", json)
    for name, value in inner.items():
        if isinstance(value, Mapping):
            _print_table(_words(name), ("", ""), list(value.items()), "left", json)
        else:
            columns = list(dict.fromkeys(key for row in value for key in row))
            rows = [[row.get(key) for key in columns] for row in value]
            print_table(_words(name), [_words(key) for key in columns], rows, json=json)
    for name, mark in _LINES.items():
        for line in facts.get(name) or ():
            say(f"{mark}: {line}")


def _row(name: str, value: Any) -> tuple[str, Any]:
    """Bytes as GiB: nobody reads ten digits."""
    if name.endswith("_bytes") and isinstance(value, int):
        return _words(name.removesuffix("_bytes")), f"{value / 2**30:.2f} GiB"
    return _words(name), value


def _print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], justify: Literal["left", "right"], json: bool
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, not str: in a str, rich reads [name] as markup.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    for place, column in enumerate(columns):
        table.add_column(Text(column), overflow="fold", justify="left" if place == 0 else justify)
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    Console(file=sys.stderr if json else results(), highlight=False).print(table)


def shown(value: Any) -> str:
    """A value for a table: four figures of a float, thousands apart in an int."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={shown(v)}" for key, v in value.items())
    return ", ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)


def short(value: Any) -> str:
    """A number in a table with intervals, where many stand side by side."""
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 10 else shown(value)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
