"""One layer of a merge: the method on the parents that have something there, then the cut to a rank.

Legend: R rank, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.config.merging import CatSettings, LinearSettings
from veneer.lowrank import inner, truncate, without_zeros
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.spaces import SEPARATED

_OVERFLOWS = "the result overflows; give smaller --weights or a smaller --scale"


@dataclass(frozen=True)
class Layer:
    """Factors of the result, float32, and what it took.

    kept: share of the merged ‖ΔW‖² that the rank has left. error: Frobenius norm of what it left out. norm: of the
    result. degenerate: singular values coincide where a choice was made between their directions.
    """

    a: Tensor
    b: Tensor
    norm: float
    kept: float
    error: float
    degenerate: bool


def merge_layer(merge: Merge, parents: Sequence[Parent], options: CatSettings) -> Layer:
    """The merged update of one layer; rank 1 of zeros where nothing is left.

    Parents of weight 0 and updates of zeros do not take part, so that an adapter of zeros changes nothing. Raises
    ValueError or LinAlgError where factors are not finite, or become so under their weights.
    """
    live = [_live(parent) for parent in parents if parent.weight]
    live = [parent for parent in live if len(parent.a)]
    merged = merge.factors(live, options) if live else _nothing(parents[0])
    if merge.stacked or not live:
        size = inner(merged.a, merged.b, merged.a, merged.b)
        _check_range(size)
        return Layer(merged.a, merged.b, norm=math.sqrt(max(0.0, size)), kept=1.0, error=0.0, degenerate=False)
    assert isinstance(options, LinearSettings)
    return _cut(merged, options)


def _check_range(*sizes: float) -> None:
    """Raises ValueError where finite parents have given a result that is not."""
    if not all(map(math.isfinite, sizes)):
        raise ValueError(_OVERFLOWS)


def _live(parent: Parent) -> Parent:
    a, b = without_zeros(parent.a, parent.b)
    return replace(parent, a=a, b=b)


def _nothing(like: Parent) -> Merged:
    return Merged(torch.zeros(1, like.a.shape[1]), torch.zeros(len(like.b), 1))


def _cut(merged: Merged, options: LinearSettings) -> Layer:
    """At the rank or share of energy asked for; where neither is, at the rank that the method means to keep."""
    rank = merged.rank if options.rank is None and options.energy is None else options.rank
    try:
        cut = truncate(*without_zeros(merged.a, merged.b), rank, options.energy, options.exact)
    except ValueError:  # the parents were finite
        raise ValueError(_OVERFLOWS) from None
    count = len(cut.a)
    if not count:  # what was to be summed has cancelled
        return Layer(*_nothing(Parent(merged.a, merged.b))[:2], norm=0.0, kept=1.0, error=0.0, degenerate=False)
    norm = float(torch.linalg.vector_norm(cut.s[:count]))
    error = math.hypot(cut.error, merged.left_out)
    tied = count < len(cut.s) and bool(cut.s[count - 1] - cut.s[count] < SEPARATED * cut.s[count - 1])
    a, b = cut.a.float(), (cut.b * options.scale).float()
    _check_range(float(a.abs().max()), float(b.abs().max()))
    return Layer(
        a,
        b,
        norm=norm * abs(options.scale),
        kept=norm**2 / (norm**2 + error**2),
        error=error * abs(options.scale),
        degenerate=merged.degenerate or tied,
    )
