"""Isotropic merging (Marczak et al. 2025, arXiv 2502.04959): the sum, with all singular values at their mean.

In the small coordinates, over the directions that the sum has. On dense updates the mean would run over min(O, I)
values, most of them zero, and arbitrary directions that no adapter uses would receive it: with ranks of 24 in 128
dimensions, 81 % of the result lay outside of what the adapters span. A `rank` limits the directions before their
values become equal, when it is still clear which are the strongest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.config.merging import IsoCtsSettings, IsoSettings
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.spaces import core_of, orthogonal, small_svd


def iso_c(parents: Sequence[Parent], options: IsoSettings) -> Merged:
    """U · mean(s) · Vᵀ of Σ w ΔW = U s Vᵀ."""
    core = core_of(parents, options.exact)
    total = small_svd(_sum(core.matrices), options.rank, core.size)
    return core.merged(total.u * _mean(total.s), total.v)


def iso_cts(parents: Sequence[Parent], options: IsoCtsSettings) -> Merged:
    """The strongest directions of the sum, and of each task the strongest that those do not write.

    The share `common` of the sum's directions stays, the rest goes to the tasks in equal parts; vectors are made
    orthogonal, and all singular values become their mean.
    """
    core = core_of(parents, options.exact)
    total = small_svd(_sum(core.matrices), options.rank, core.size)
    each = int(len(total.s) * (1 - options.common) / len(parents))
    count = len(total.s) - each * len(parents)
    u, s, v = [total.u[:, :count]], [total.s[:count]], [total.v[:, :count]]
    for matrix_KK in core.matrices:
        own = small_svd(matrix_KK - u[0] @ (u[0].mT @ matrix_KK), each, core.size)
        u, s, v = [*u, own.u], [*s, own.s], [*v, own.v]
    return core.merged(orthogonal(torch.cat(u, 1)) * _mean(torch.cat(s)), orthogonal(torch.cat(v, 1)))


def _sum(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).sum(0)


def _mean(s_D: Tensor) -> Tensor:
    """0 of none: weights may cancel the parents."""
    return s_D.sum() / max(1, len(s_D))


ISO_C = Merge(iso_c, IsoSettings, neutral=None)
ISO_CTS = Merge(iso_cts, IsoCtsSettings, neutral=None)
