"""The best approximation of Σ w ΔW at the rank of the largest parent, or the rank or share of energy asked for."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.config.merging import SvdSettings
from veneer.lowrank import concatenate
from veneer.merge.method import Merge, Merged, Parent


def svd(parents: Sequence[Parent], options: SvdSettings) -> Merged:
    """PEFT's combination of this name, by Eckart and Young the same, without a dense matrix."""
    stacked = concatenate([(p.a, p.b) for p in parents], [p.weight for p in parents])
    return Merged(*stacked, rank=max(len(p.a) for p in parents))


SVD = Merge(svd, SvdSettings, neutral={})
