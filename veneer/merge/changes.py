"""What a tuned model changed beside its linear layers, which no adapter on these holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.merge.checkpoints import Pair
from veneer.merge.summary import kind_of
from veneer.model.progress import shown

PIECE = 2**24  # elements compared at a time, so that an embedding takes no copies of itself


@dataclass(frozen=True)
class Change:
    """Tensors of one kind: how many there are, how many changed, and ‖tuned - base‖ / ‖base‖ over those."""

    count: int
    changed: int
    relative: float


def distance(base: Tensor, tuned: Tensor) -> float:
    """‖tuned - base‖; 0 where every value is that of the base but for the rounding of the tuned model's dtype."""
    eps = torch.finfo(tuned.dtype).eps / 2 if tuned.dtype != base.dtype else 0.0
    tiny = torch.finfo(tuned.dtype).tiny * eps  # half the distance of two subnormal numbers
    squares, beyond = 0.0, False
    for one, other in zip(base.flatten().split(PIECE), tuned.flatten().split(PIECE), strict=True):
        one = one.float()
        gap = other.float() - one
        beyond = beyond or not bool((gap.abs() <= eps * one.abs() + tiny).all())  # NaN is beyond, too
        squares += float(torch.linalg.vector_norm(gap, dtype=torch.float64)) ** 2
    return squares**0.5 if beyond else 0.0


def changes(pair: Pair, parameters: Sequence[str], progress: bool) -> dict[str, Change]:
    """Kind of parameter (`model.layers.*.input_layernorm.weight`) -> its change; only those that changed."""
    sizes: dict[str, list[tuple[float, float]]] = {}
    for parameter in shown(parameters, "comparing what is not linear", progress):
        base, tuned = pair.read(parameter)
        size = float(torch.linalg.vector_norm(base, dtype=torch.float64))
        sizes.setdefault(kind_of(parameter), []).append((distance(base, tuned), size))
    found = {kind: _change(both) for kind, both in sizes.items()}
    return {kind: change for kind, change in found.items() if change.changed}


def _change(both: Sequence[tuple[float, float]]) -> Change:
    moved = [(gap, size) for gap, size in both if gap != 0]
    gaps, sizes = sum(gap**2 for gap, _ in moved) ** 0.5, sum(size**2 for _, size in moved) ** 0.5
    return Change(len(both), len(moved), gaps / sizes if sizes else float("inf") if moved else 0.0)
