"""Which rows each training step sees: a pure function of (seed, step), so that resuming needs no saved state."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from veneer.errors import DataError


@dataclass(frozen=True)
class Batches:
    """Seeded micro-batches over `n_rows` rows: each epoch is a new permutation, its last short batch is kept."""

    n_rows: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_rows < 1 or self.batch_size < 1:
            raise DataError(f"{self.n_rows} rows in batches of {self.batch_size}: wanted at least 1 of each")

    @property
    def steps_per_epoch(self) -> int:
        """Micro-batches in one pass over the rows."""
        return -(-self.n_rows // self.batch_size)

    def rows(self, step: int) -> list[int]:
        """Row indices of micro-batch `step`, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step is {step}, wanted 0 or more")
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        return list(_order(self.n_rows, "batches", self.seed, epoch)[start : start + self.batch_size])


def split(
    n_rows: int, validation: float | int, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Train and validation row indices, each ascending; `validation` is a fraction below 1 or a number of rows.

    Rows of the same group (the same prompt, say) stay on one side, so that validation never repeats what was
    trained on; validation then has at least the rows asked for where whole groups allow no better.
    Raises DataError where either side would be empty, unless `validation` is 0.
    """
    wanted = _validation_rows(n_rows, validation)
    members: dict[Hashable, list[int]] = {}
    for row in range(n_rows):
        members.setdefault(groups[row] if groups is not None else row, []).append(row)
    clusters = list(members.values())
    held: list[int] = []
    for cluster in _order(len(clusters), "split", seed, 0):
        if len(held) >= wanted:
            break
        held += clusters[cluster]
    if wanted and len(held) == n_rows:
        raise DataError(_unsplittable(n_rows, validation))
    outside = set(range(n_rows)).difference(held)
    return sorted(outside), sorted(held)


def _validation_rows(n_rows: int, validation: float | int) -> int:
    by_fraction = isinstance(validation, float)
    if not (0 <= validation < 1 if by_fraction else 0 <= validation < n_rows):
        raise DataError(_unsplittable(n_rows, validation))
    return max(1, round(n_rows * validation)) if by_fraction and validation else int(validation)


def _unsplittable(n_rows: int, validation: float | int) -> str:
    return (
        f"validation_split is {validation}, which leaves nothing to train on or is negative: the data has {n_rows} "
        "rows. Wanted a fraction from 0 to below 1, or fewer rows than there are; 0 means no validation."
    )


@lru_cache(maxsize=8)
def _order(n: int, purpose: str, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of range(n). Raw Philox words are fixed for ever by their specification, unlike
    `Generator.permutation`, whose algorithm NumPy may change; sorting them is the same on every platform."""
    digest = hashlib.sha256(f"veneer/{purpose}/{seed}/{epoch}".encode()).digest()
    keys = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return tuple(np.argsort(keys, kind="stable").tolist())
