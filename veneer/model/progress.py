"""A bar on standard error for what takes longer than a moment; lines where that is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PATIENCE = 2.0  # seconds before the bar is shown
FIRST, EVERY = 10.0, 30.0  # seconds until a line, and between two, where there is no terminal for a bar


def shown(items: Sequence[T], what: str, progress: bool) -> Iterator[T]:
    """The items, one after the other, with a bar; a line now and then where standard error is no terminal."""
    if not progress:
        yield from items
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _told(items, what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task, started = bar.add_task(what, total=len(items)), time.monotonic()
    try:
        for done, item in enumerate(items):
            if time.monotonic() - started > PATIENCE:
                bar.start()  # again and again: the second call does nothing
            bar.update(task, completed=done)
            yield item
    finally:
        bar.stop()


def _told(items: Sequence[T], what: str) -> Iterator[T]:
    due = time.monotonic() + FIRST
    for done, item in enumerate(items):
        if time.monotonic() > due:
            due = time.monotonic() + EVERY
            print(f"{what}: {done} of {len(items)}", file=sys.stderr, flush=True)
        yield item
