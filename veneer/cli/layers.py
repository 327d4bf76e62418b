"""Layers of an adapter as a table of their kinds, which fits where two hundred lines would not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from veneer.cli.output import print_table, say

_LEGEND = (
    "kept: of the squared norm of what was made, what the rank has left; error: of its norm, what was cut off; neither "
    "tells what a skill keeps"
)


def print_layers(title: str, report: Mapping[str, Any], *, json: bool) -> None:
    """What a merge or a cut kept, by kind of layer and in all; then the notes."""
    kinds = report["kinds"]
    start = _start([row["layers"] for row in kinds])
    rows = [
        [row["layers"][len(start) :], row["count"], row["rank"], row["kept"], row["error"], *_worst(row)]
        for row in kinds
    ]
    total = ["all", sum(row["count"] for row in kinds), "", report["kept"], report["error"], None, None]
    columns = (f"{start}…" if start else "layers", "count", "rank", "kept", "error", "worst", "kept there")
    print_table(title, columns, [*rows, total], json=json)
    say(_LEGEND)
    for note in report["notes"]:
        say(f"note: {note}")


def _start(kinds: Sequence[str]) -> str:
    """The parts of the paths that all of them begin with, with the dot after it."""
    parts = [kind.split(".")[:-1] for kind in kinds]
    same = takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return "".join(f"{names[0]}." for names in same)


def _worst(row: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The numbers in the path of the worst layer, which are what its kind does not tell."""
    if row["worst"] is None:
        return None, None
    return ".".join(re.findall(r"(?<![^.])\d+(?![^.])", row["worst"])) or row["worst"], row["worst_kept"]
