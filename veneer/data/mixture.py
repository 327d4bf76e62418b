"""Several data sets in shares: what an epoch takes of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from veneer.data.batches import split


def epoch(sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[list[int]]:
    """Row numbers of each data set in one epoch, the counts in the proportion of `weights`.

    An epoch is as long as it takes to see every row: one data set comes once, the others again and again, the last
    time with rows drawn by `seed`. A fixed list, so that the order of batches stays a function of (seed, step).
    """
    once = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [_repeated(size, round(weight * once), seed) for size, weight in zip(sizes, weights, strict=True)]


def _repeated(size: int, count: int, seed: int) -> list[int]:
    whole, rest = divmod(max(size, count), size)
    drawn = split(size, rest, seed)[1] if rest else []
    return [*range(size)] * whole + drawn


def shares(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]
