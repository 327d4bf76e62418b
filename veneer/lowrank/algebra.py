"""Sums of low-rank updates by stacking their factors: exact, and no arithmetic but the weights.

Shapes: a_RI, b_OR; the ranks of several updates may differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """ΔW = b @ a, with a (R, I) and b (O, R)."""

    a: Tensor
    b: Tensor


def concatenate(updates: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float] | None = None) -> Factors:
    """Factors of Σ w ΔW, all w = 1 by default: A below A, w B beside w B; the ranks add up. Exact.

    Raises AssertionError for updates of different weights, or another number of weights than of updates.
    """
    weights = [1.0] * len(updates) if weights is None else weights
    assert len(updates) == len(weights) > 0, f"{len(updates)} updates and {len(weights)} weights"
    shapes = {(len(b_OR), a_RI.shape[1]) for a_RI, b_OR in updates}
    assert len(shapes) == 1, f"updates of different weights: {' and '.join(f'{o} x {i}' for o, i in sorted(shapes))}"
    scaled = [b_OR if weight == 1 else b_OR * weight for (_, b_OR), weight in zip(updates, weights, strict=True)]
    return Factors(torch.cat([a_RI for a_RI, _ in updates]), torch.cat(scaled, dim=1))


def add(a1_RI: Tensor, b1_OR: Tensor, a2_RI: Tensor, b2_OR: Tensor) -> Factors:
    """Factors of ΔW₁ + ΔW₂, rank R₁ + R₂."""
    return concatenate([(a1_RI, b1_OR), (a2_RI, b2_OR)])


def subtract(a1_RI: Tensor, b1_OR: Tensor, a2_RI: Tensor, b2_OR: Tensor) -> Factors:
    """Factors of ΔW₁ - ΔW₂, rank R₁ + R₂."""
    return concatenate([(a1_RI, b1_OR), (a2_RI, b2_OR)], [1.0, -1.0])


def scale(a_RI: Tensor, b_OR: Tensor, factor: float) -> Factors:
    """Factors of `factor` · ΔW; A stays as it is."""
    return Factors(a_RI, b_OR * factor)


def without_zeros(a_RI: Tensor, b_OR: Tensor) -> Factors:
    """Without the products b_r a_r that are zero; rank 0 where all are. The same ΔW, to the bit.

    Raises ValueError where a factor is not finite.
    """
    # Sums of sizes, which neither vanish for small values nor take the time of `any`, or of vector_norm along columns.
    a_R, b_R = a_RI.abs().sum(1), b_OR.abs().sum(0)
    if not len(a_R):
        return Factors(a_RI, b_OR)
    (least_a, most_a), (least_b, most_b) = (map(float, one_R.aminmax()) for one_R in (a_R, b_R))
    if not math.isfinite(most_a + most_b) and not (a_RI.isfinite().all() and b_OR.isfinite().all()):
        raise ValueError("the factors hold NaN or infinite values")
    if least_a > 0 and least_b > 0:
        return Factors(a_RI, b_OR)
    kept_R = (a_R != 0) & (b_R != 0)
    return Factors(a_RI[kept_R], b_OR[:, kept_R])
