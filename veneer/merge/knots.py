"""KnOTS (Stoica et al. 2024, arXiv 2410.19735): [ΔW ... ΔW] = U S [V ... V]ᵀ; entries of the V are merged.

The SVD is that of the small coordinates, so it costs what the ranks cost, and no dense update is made; equal to the
published dense one up to rounding. Directions below 1e-7 of the strongest are left out (the paper's code: below 1e-5,
absolute). Weights multiply V after the basis is found.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.config.merging import KnotsSettings
from veneer.merge.elementwise import merge_entries
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.spaces import core_of, small_svd


def knots(parents: Sequence[Parent], options: KnotsSettings) -> Merged:
    """U S · merged Vᵀ, with the element-wise method `inner`."""
    core = core_of(parents, options.exact)
    basis = small_svd(torch.cat([task.u * task.s for task in core.tasks], dim=1))
    dtype = torch.float64 if options.exact else torch.float32
    lefts_DR = [
        ((basis.u / basis.s).mT @ (task.u * task.s * weight)).to(dtype)
        for task, weight in zip(core.tasks, core.weights, strict=True)
    ]
    right_SI = core.right.lift(torch.cat([task.v for task in core.tasks], dim=1)).to(dtype).mT
    rights_RI = right_SI.split([left_DR.shape[1] for left_DR in lefts_DR])
    merged_DI = merge_entries(list(zip(lefts_DR, rights_RI, strict=True)), parents, options, options.inner)
    return Merged(merged_DI, core.left.lift(basis.u * basis.s), degenerate=basis.degenerate)


KNOTS = Merge(knots, KnotsSettings, neutral={"density": 1.0})
