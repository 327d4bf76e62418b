"""Where `magnitude`, `ties` and DARE compare entries: every output's own row, over shared directions of the input.

The papers compare entries of dense updates. PEFT compares entries of A with entries of A, and of B with B: not a
function of the updates at all (another factorisation of the same ΔW changed its TIES by 125 %), with cross terms
between adapters, and 1.7 times the noise under DARE. Here an entry is one of C = ΔW V, (O, D), with V (I, D) the right
singular vectors of all parents' updates stacked: ΔW = C Vᵀ loses nothing, V is orthonormal, so an entry of C weighs
exactly what it takes of ‖ΔW‖², DARE's noise is that on dense entries, √((1 - p) / p) of ‖ΔW‖ at density p, and the
result is C' Vᵀ, without cross terms. It is not the paper's dense merge, whose result has full rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.config.merging import Elementwise, MagnitudeSettings
from veneer.merge.elementwise import merge_entries
from veneer.merge.method import Merged, Parent
from veneer.merge.spaces import core_of, small_svd


def merge_rows(parents: Sequence[Parent], options: MagnitudeSettings, how: Elementwise) -> Merged:
    """The element-wise method on C; rank D, the number of directions that the parents read."""
    core = core_of(parents, options.exact)
    basis = small_svd(torch.cat([task.v * task.s for task in core.tasks], dim=1))  # of all ΔW, one below the other
    dtype = torch.float64 if options.exact else torch.float32
    left_OS = core.left.lift(torch.cat([task.u * task.s for task in core.tasks], dim=1)).to(dtype)
    rights_RD = [
        (task.v.mT @ basis.u * weight).to(dtype) for task, weight in zip(core.tasks, core.weights, strict=True)
    ]
    lefts_OR = left_OS.split([len(right_RD) for right_RD in rights_RD], dim=1)
    merged_OD = merge_entries(list(zip(lefts_OR, rights_RD, strict=True)), parents, options, how)
    return Merged(core.right.lift(basis.u).mT, merged_OD, degenerate=basis.degenerate)
