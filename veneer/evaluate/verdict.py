"""Merge two adapters, or serve both? What a merge keeps, foretold from the loss of a few rows of each one's data.

What the weights tell (cosine, overlap, signs, interference) foretells nothing of it; the loss on a few dozen rows does.
Fitted on 60 pairs of 24 small tasks on one model, judged on tasks left out, by `python -m benchmarks.merge_verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.evaluate.on_data import OnFile

# Of the share of the worse task's gain in score: a line over `spread`, and how far off four of five pairs were.
CONSTANT, SLOPE, OFF = -0.004, 0.384, (-0.19, 0.23)
ENOUGH = 0.8  # share of the gain; below it serving both is worth its price
MERGE, SERVE_BOTH = "merge", "serve both"
TITLE = "merge, or serve both?"
HEADS = ("pair", "foretold", "four of five", "verdict")
LEGEND = (
    "foretold: of its gain in score, what the worse of the two keeps in A/2 + B/2, told from `kept` as 60 pairs of "
    f"small tasks had it; merge: {ENOUGH:.0%} or more. Rows that were trained on tell less (docs/merging.md)"
)


def spread(kept: float) -> float:
    """-log(1.1 - k) of the share k of a gain in loss: where little is lost, each hundredth counts for more."""
    return -math.log(1.1 - max(-1.0, min(1.0, kept)))


@dataclass(frozen=True)
class Foretold:
    """Of two adapters, by their places, merged as A/2 + B/2: the share of its gain in score that the worse of the two
    tasks keeps, and where four of five such pairs lay (`low`, `high`)."""

    first: int
    second: int
    kept: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return MERGE if self.kept >= ENOUGH else SERVE_BOTH

    def cells(self, names: Sequence[str]) -> list[str]:
        """Of a table under HEADS."""
        pair = f"{names[self.first]} : {names[self.second]}"
        return [pair, f"{self.kept:.0%}", f"{self.low:.0%} to {self.high:.0%}", self.verdict]

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """With names in the place of numbers."""
        return {**asdict(self), "first": names[self.first], "second": names[self.second], "verdict": self.verdict}


def verdicts(found: Sequence[OnFile]) -> tuple[Foretold, ...]:
    """Of every two adapters that both gain on their own data, told apart from none."""
    kept = {(one.adapter, each.other): each.kept for one in found for each in one.beside}
    told = []
    for (first, second), mine in kept.items():
        theirs = kept.get((second, first))
        if first < second and mine is not None and theirs is not None:
            told.append(foretell(first, second, min(mine, theirs)))
    return tuple(told)


def foretell(first: int, second: int, kept: float) -> Foretold:
    """kept: of its gain in loss on its own data, what the worse of the two keeps in A/2 + B/2."""
    told = CONSTANT + SLOPE * spread(kept)
    share, low, high = (max(0.0, min(1.0, one)) for one in (told, told + OFF[0], told + OFF[1]))
    return Foretold(first, second, share, low, high)
