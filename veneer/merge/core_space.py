"""Core Space (Panariello et al. 2025, arXiv 2509.17786): all adapters in two shared bases, merged entry by entry there.

The bases are those of the stacked B and of the stacked A, every adapter in its canonical form (B = U √s, A = √s Vᵀ).
The published code stacks the factors as they are, so its bases, and with them every element-wise merge, move with the
factorisation. This is another method than the same merge on dense entries, not a faster way to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.config.merging import CoreSettings
from veneer.merge.elementwise import merge_entries
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.spaces import core_of, small_svd


def core_space(parents: Sequence[Parent], options: CoreSettings) -> Merged:
    """U · merged (UᵀΔW V) · Vᵀ, with the element-wise method `inner`."""
    core = core_of(parents, options.exact)
    left = small_svd(torch.cat([task.u * task.s.sqrt() for task in core.tasks], dim=1))
    right = small_svd(torch.cat([task.v * task.s.sqrt() for task in core.tasks], dim=1))
    merged_DD = merge_entries(core.within(left.u, right.u), parents, options, options.inner)
    found = small_svd(merged_DD, size=core.size)
    return core.merged(left.u @ (found.u * found.s), right.u @ found.v, degenerate=left.degenerate or right.degenerate)


CORE = Merge(core_space, CoreSettings, neutral={"density": 1.0})
