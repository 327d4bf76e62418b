"""The progress bar of a run: rich's in a terminal; in a notebook, HTML that every front end shows without widgets."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from html import escape
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar(Protocol):
    """A line for each job: what it is called, how far it is, some words."""

    def start(self, jobs: Mapping[str, tuple[int, int]]) -> None:
        """jobs: name -> (steps done, steps in all)."""

    def update(self, name: str, done: int, facts: str) -> None: ...

    def stop(self) -> None: ...


def bar() -> Bar:
    """The bar for where this process runs."""
    return NotebookBar() if in_notebook() else TerminalBar()


def in_notebook() -> bool:
    """Whether cells of a notebook (Jupyter, Colab, VS Code) run in this process; IPython in a terminal is none."""
    ipython = sys.modules.get("IPython")  # a notebook has it loaded long before us
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and hasattr(shell, "kernel")


class TerminalBar:
    """rich's bars on standard error; where that is no terminal, the last state alone."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        console = Console(stderr=True)
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, *times, console=console, refresh_per_second=4)
        self.tasks: dict[str, TaskID] = {}

    def start(self, jobs: Mapping[str, tuple[int, int]]) -> None:
        self.progress.start()
        for name, (done, total) in jobs.items():
            self.tasks[name] = self.progress.add_task(name, total=total, completed=done, facts="")

    def update(self, name: str, done: int, facts: str) -> None:
        self.progress.update(self.tasks[name], completed=done, facts=facts)

    def stop(self) -> None:
        self.progress.stop()


class NotebookBar:
    """One output of the cell, drawn anew up to twice a second."""

    EVERY = 0.5  # seconds: each drawing is a message to the browser, and kept with the notebook

    def __init__(self) -> None:
        self.lines: dict[str, tuple[int, int, str]] = {}
        self.display: Any = None
        self.drawn = 0.0

    def start(self, jobs: Mapping[str, tuple[int, int]]) -> None:
        from IPython.display import HTML, display

        self.lines = {name: (done, total, "") for name, (done, total) in jobs.items()}
        self.display = display(HTML(self.html()), display_id=True)

    def update(self, name: str, done: int, facts: str) -> None:
        self.lines[name] = (done, self.lines[name][1], facts)
        if time.monotonic() - self.drawn >= self.EVERY:
            self._draw()

    def stop(self) -> None:
        self._draw()

    def html(self) -> str:
        return "".join(
            f'<div><progress value="{done}" max="{total}"></progress> {escape(name)} {done}/{total} '
            f"{escape(facts)}</div>"
            for name, (done, total, facts) in self.lines.items()
        )

    def _draw(self) -> None:
        from IPython.display import HTML

        self.drawn = time.monotonic()
        if self.display is not None:
            self.display.update(HTML(self.html()))
