"""A bar on standard error for what takes longer than a moment at load."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
PATIENCE = 2.0  # seconds before the bar is shown


def shown(items: Sequence[T], what: str, progress: bool) -> Iterator[T]:
    """The items, one after the other; silent where standard error is no terminal."""
    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        yield from items
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
