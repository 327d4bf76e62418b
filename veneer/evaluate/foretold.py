"""What a merge of two adapters would keep of what they can do, foretold from the loss of a few rows of each.

The weights (cosine, overlap, signs, interference) foretell nothing of it, the loss does. A share and no verdict:
whether it is enough depends on what serving both would cost. Fitted on 253 pairs of 23 small tasks on one model, judged
with tasks left out, by `python -m benchmarks.merge_verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from veneer.evaluate.on_data import Beside, OnFile

# Of the curve of `share_kept`; and up to a share that it tells, between what lower and upper differences four of five
# pairs lay whose tasks it was not fitted on.
CONSTANT, SLOPE = -2.862, -2.087
OFF = ((0.26, -0.18, 0.33), (0.62, -0.32, 0.3), (1.0, -0.24, 0.17))
FEWEST = 20  # rows; it was fitted on 30 of each task
TITLE = "what a merge would keep"
HEADS = ("pair", "foretold", "four of five")
LEGEND = (
    "foretold: of its gain in exact answers, what the worse of the two keeps in A/2 + B/2, told from `kept` as 253 "
    "pairs of small tasks on one model had it; serving both keeps all, weights learned on rows of both "
    "(merge --method lora_soups --dataset) kept more than any other method (docs/merging.md)"
)


def gain_kept(base: float, alone: float, merged: float) -> float:
    """The share of an adapter's gain in loss that a merged one keeps. Raises ZeroDivisionError without a gain."""
    return (base - merged) / (base - alone)


def log_lost(loss_kept: float) -> float:
    """log(1.1 - k) of the share k of a gain in loss: where little is lost, each hundredth counts for more."""
    return math.log(1.1 - max(-1.0, min(1.0, loss_kept)))


def share_kept(lost: Any, constant: float = CONSTANT, slope: float = SLOPE) -> Any:
    """Of its gain in score, what the worse task keeps: a logistic curve over `log_lost`, of a number or an array.

    Merged answers turn wrong together: where half of a gain in loss is lost, next to nothing of the score is left.
    """
    return 1 / (1 + np.exp(-(constant + slope * lost)))


@dataclass(frozen=True)
class Foretold:
    """Of two adapters, by their places, merged as A/2 + B/2: the share of its gain in score that the worse of the two
    tasks keeps, and where four of five such pairs lay (`low`, `high`). Below 0: worse than the base."""

    first: int
    second: int
    share: float
    low: float
    high: float

    def cells(self, names: Sequence[str]) -> list[str]:
        """Of a table under HEADS."""
        pair = f"{names[self.first]} : {names[self.second]}"
        return [pair, f"{self.share:.0%}", f"{self.low:.0%} to {self.high:.0%}"]

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """With names in the place of numbers."""
        return {**asdict(self), "first": names[self.first], "second": names[self.second]}


def foretell(first: int, second: int, loss_kept: float) -> Foretold:
    """loss_kept: of its gain in loss on its own data, what the worse of the two keeps in A/2 + B/2."""
    share = float(share_kept(log_lost(loss_kept)))
    low, high = next((low, high) for top, low, high in OFF if share <= top)
    return Foretold(first, second, share, share + low, min(1.0, share + high))


def foretold(found: Sequence[OnFile], names: Sequence[str]) -> tuple[tuple[Foretold, ...], tuple[str, ...]]:
    """Of every two adapters, and why there is nothing to tell of the others."""
    places = {(one.adapter, each.other): (one, each) for one in found for each in one.beside}
    told, silent = [], []
    for (first, second), mine in places.items():
        if first < second:
            both = (mine, places[second, first])
            if why := _why_not(both, names):
                silent.append(f"{names[first]} : {names[second]}: what a merge keeps is not foretold{why}")
            else:
                told.append(foretell(first, second, min(beside.kept or 0.0 for _, beside in both)))
    return tuple(told), tuple(silent)


def _why_not(both: Sequence[tuple[OnFile, Beside]], names: Sequence[str]) -> str:
    unsure = [names[file.adapter] for file, beside in both if beside.kept is None]
    if unsure:
        gain = "does not surely gain on its" if len(unsure) == 1 else "do not surely gain on their"
        return f": {' and '.join(unsure)} {gain} own data; more rows tell more"
    if any(file.rows < FEWEST for file, _ in both):
        counts = " and ".join(f"{file.file} has {file.rows}" for file, _ in both)
        return f" from fewer than {FEWEST} rows; {counts}"
    return ""
