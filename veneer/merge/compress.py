"""Compress, then merge (arXiv 2606.03723): the rank-r spaces that all adapters share best; the merge happens in there.

U (K, r) and V (K, r) maximise Σ ‖Uᵀ w ΔW V‖², in turns from the strongest directions that the parents read. Each
adapter becomes r x r numbers, which the element-wise method `inner` merges, so the result has rank r without a cut
after the merge, which would undo what was merged. The abstract gives the idea; the maximisation is our reading of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.config.merging import CompressSettings
from veneer.merge.elementwise import merge_entries
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.spaces import SEPARATED, core_of, small_svd

ROUNDS = 50
SETTLED = 1e-9  # relative gain in a round below which it ends


def compress(parents: Sequence[Parent], options: CompressSettings) -> Merged:
    """U · merged (Uᵀ w ΔW V) · Vᵀ."""
    core = core_of(parents, options.exact)
    rank = options.rank or max(len(p.a) for p in parents)
    stack_kKK = torch.stack(core.matrices)
    u_Kr, v_Kr, degenerate = shared_spaces(stack_kKK, rank)
    merged_rr = merge_entries(core.within(u_Kr, v_Kr), parents, options, options.inner)
    total_KK = stack_kKK.sum(0)
    left_out = float(torch.linalg.matrix_norm(total_KK - u_Kr @ (u_Kr.mT @ total_KK @ v_Kr) @ v_Kr.mT))
    found = small_svd(merged_rr, size=core.size)
    return core.merged(u_Kr @ (found.u * found.s), v_Kr @ found.v, left_out=left_out, degenerate=degenerate)


def shared_spaces(stack_kKK: Tensor, rank: int) -> tuple[Tensor, Tensor, bool]:
    """U (K, r), V (K, r), and whether the choice of the last direction was one of rounding."""
    v_Kr, _, degenerate = _strongest(stack_kKK.mT, rank)
    kept = 0.0  # not what V alone holds, which is more than U and V can
    for _ in range(ROUNDS):
        u_Kr, _, _ = _strongest(stack_kKK @ v_Kr, rank)
        v_Kr, now, _ = _strongest(stack_kKK.mT @ u_Kr, rank)
        if now - kept <= SETTLED * now:
            break
        kept = now
    return u_Kr, v_Kr, degenerate


def _strongest(stack_kKD: Tensor, rank: int) -> tuple[Tensor, float, bool]:
    """The `rank` directions of K that hold most of the stack, how much they hold, and whether the last one ties."""
    size, vectors = torch.linalg.eigh(torch.einsum("kad,kbd->ab", stack_kKD, stack_kKD))
    size, vectors = size.flip(0), vectors.flip(1)
    tied = len(size) > rank and bool(size[rank - 1] - size[rank] < SEPARATED * size[rank - 1])
    return vectors[:, :rank], float(size[:rank].sum()), tied


COMPRESS = Merge(compress, CompressSettings, neutral={})
