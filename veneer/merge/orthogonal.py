"""Orthogonal projection: each adapter without what those before it read or write, as in OPCM (arXiv 2501.09522).

    merged += (1 - U Uᵀ) w ΔW (1 - V Vᵀ),   U, V the directions of what is merged so far

The first adapter stays whole, so the order counts. Of OPCM (Tang et al. 2025) this is the projection alone: without the
factor that keeps the norm of the result constant as more come in; use `scale`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.config.merging import OrthogonalSettings
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.spaces import Small, core_of, small_svd


def orthogonal(parents: Sequence[Parent], options: OrthogonalSettings) -> Merged:
    """In the order of the parents. What `protect` leaves out of U and V are the weakest directions."""
    core = core_of(parents, options.exact)
    merged_KK = torch.zeros_like(core.matrices[0])
    for matrix_KK in core.matrices:
        taken = _strongest(small_svd(merged_KK), options.protect)
        free_KK = matrix_KK - taken.u @ (taken.u.mT @ matrix_KK)
        merged_KK = merged_KK + free_KK - (free_KK @ taken.v) @ taken.v.mT
    found = small_svd(merged_KK, size=core.size)
    return core.merged(found.u * found.s, found.v)


def _strongest(found: Small, share: float) -> Small:
    """The fewest directions that have this share of the squared norm."""
    size = found.s.square().cumsum(0)
    count = len(size) if share == 1 or not len(size) else 1 + int((size < share * size[-1]).sum())
    return Small(found.u[:, :count], found.s[:count], found.v[:, :count])


ORTHOGONAL = Merge(orthogonal, OrthogonalSettings, neutral={}, ordered=True)
