"""The best approximation of an update at a lower rank, in canonical factors, and what it leaves out.

Shapes: a_RI, b_OR with I inputs, O outputs, R rank; K = min(O, I, R), the most directions that ΔW can have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.lowrank.frame import Frame
from veneer.lowrank.spectrum import column_signs, frames

# Directions weaker than this part of the strongest one are rounding of float32 factors, not something learned. A tenth
# of it is what float32 itself resolves.
NEGLIGIBLE = 1e-6


class Truncated(NamedTuple):
    """Canonical factors, A = √s Vᵀ (r, I) and B = U √s (O, r), and all K singular values of what they were cut from."""

    a: Tensor
    b: Tensor
    s: Tensor

    @property
    def error(self) -> float:
        """Frobenius norm of what was left out."""
        return float(torch.linalg.vector_norm(self.s[len(self.a) :]))

    @property
    def kept(self) -> float:
        """Share of ‖ΔW‖² that is kept, in [0, 1]; 1 for ΔW = 0."""
        total = float(torch.linalg.vector_norm(self.s))
        return 1.0 - (self.error / total) ** 2 if total else 1.0


def truncate(
    a_RI: Tensor, b_OR: Tensor, rank: int | None = None, energy: float | None = None, exact: bool = False
) -> Truncated:
    """The best approximation of B·A (Eckart-Young) of at most `rank` directions that keeps a share `energy` of ‖ΔW‖².

    Without either, all directions stay that are more than rounding of float32. Fewer than `rank` come back where ΔW
    has no more, none where it is zero. In the dtype of the input, computed in float64: from Gram matrices where that
    loses less than float32's rounding (`frame`), always by Householder QR with `exact`.

    AAᵀ = BᵀB = diag(s), and the entry of largest size in each column of B is positive: unique up to rounding where the
    singular values are separated, so that whatever is computed from these factors does not depend on those given.
    Raises ValueError where a factor is not finite.
    """
    assert rank is None or rank >= 0, f"rank must not be negative, got {rank}"
    assert energy is None or 0 < energy <= 1, f"energy must be in (0, 1], got {energy}"
    left, right = frames(a_RI, b_OR, exact)
    core_KK = left.coords_KR @ right.coords_KR.mT
    if not core_KK.isfinite().all():
        raise ValueError("the factors hold NaN or infinite values, or their product overflows")
    u_KK, s_K, vt_KK = torch.linalg.svd(core_KK, full_matrices=False)
    kept = _directions(s_K, rank, energy, _rounding(left, right, exact))
    root_r = s_K[:kept].sqrt()
    b_Or, a_rI = left.lift(u_KK[:, :kept] * root_r), right.lift(vt_KK[:kept].mT * root_r).mT
    sign_r = column_signs(b_Or) if kept else root_r
    return Truncated((a_rI * sign_r[:, None]).to(a_RI.dtype).contiguous(), (b_Or * sign_r).to(b_OR.dtype), s_K)


def balanced(a_RI: Tensor, b_OR: Tensor, exact: bool = False) -> Truncated:
    """The canonical factors of the same B·A: `truncate` without a limit."""
    return truncate(a_RI, b_OR, exact=exact)


def _rounding(left: Frame, right: Frame, exact: bool) -> float:
    """What a singular value must exceed: rounding of the largest product b_r a_r, which others may have cancelled."""
    sizes_R = left.coords_KR.norm(dim=0) * right.coords_KR.norm(dim=0)
    part = 1e-15 * max(len(left.x_NR), len(right.x_NR)) if exact else NEGLIGIBLE / 10
    return part * float(sizes_R.max()) if len(sizes_R) else 0.0


def _directions(s_K: Tensor, rank: int | None, energy: float | None, rounding: float) -> int:
    """How many of the singular values stay."""
    count = int((s_K > rounding).sum())
    if energy is not None and energy < 1 and count:
        size = s_K.square().cumsum(0)
        count = min(count, 1 + int((size < energy * size[-1]).sum()))
    return count if rank is None else min(count, rank)
