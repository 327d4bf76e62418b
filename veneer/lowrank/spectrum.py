"""Singular values of an update, and what they tell; float64 and Householder QR throughout.

Shapes: a_RI, b_OR with I inputs, O outputs, R rank; K = min(O, I, R), the most directions that ΔW can have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.lowrank.frame import Frame, frame


def norm(a_RI: Tensor, b_OR: Tensor) -> float:
    """Frobenius norm of B·A."""
    left, right = frames(a_RI, b_OR, exact=True)
    return float(torch.linalg.matrix_norm(left.coords_KR @ right.coords_KR.mT))


def singular_values(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """The K singular values of B·A that can differ from zero, largest first; float64."""
    return svd(a_RI, b_OR)[1]


def svd(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, K), s (K,), V (I, K) with B·A = U diag(s) Vᵀ, s largest first; float64.

    Signs are fixed (the entry of largest size in each column of U is positive), so separated singular values give
    the same U and V for every factorisation of the same ΔW.
    """
    left, right = frames(a_RI, b_OR, exact=True)
    u_KK, s_K, vt_KK = torch.linalg.svd(left.coords_KR @ right.coords_KR.mT, full_matrices=False)
    u_OK, v_IK = left.lift(u_KK), right.lift(vt_KK.mT)
    sign_K = column_signs(u_OK)
    return u_OK * sign_K, s_K, v_IK * sign_K


def svd_each(a_nRI: Tensor, b_nOR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (n, O, K), s (n, K), V (n, I, K) of n updates of one rank at once; float64, and U and V of either sign.

    From Gram matrices where that is safe for all of them (`frame`), else by Householder QR.
    """
    left, right = frame(b_nOR), frame(a_nRI.mT)
    u_nKK, s_nK, vt_nKK = torch.linalg.svd(left.coords_KR @ right.coords_KR.mT, full_matrices=False)
    return left.lift(u_nKK), s_nK, right.lift(vt_nKK.mT)


def effective_rank(a_RI: Tensor, b_OR: Tensor) -> float:
    """exp of the entropy of s / Σs (Roy and Vetterli, 2007), counted in directions.

    K for K equal singular values, 1 for a single one, 0 for ΔW = 0.
    """
    s_K = singular_values(a_RI, b_OR)
    total = float(s_K.sum())
    if total == 0.0:
        return 0.0
    return math.exp(float(torch.special.entr(s_K / total).sum()))


def frames(a_RI: Tensor, b_OR: Tensor, exact: bool = False) -> tuple[Frame, Frame]:
    """Of what ΔW writes (B) and of what it reads (Aᵀ); ΔW in these bases is the core `B.coords @ A.coordsᵀ`."""
    assert a_RI.ndim == b_OR.ndim == 2 and a_RI.shape[0] == b_OR.shape[1], (
        f"factors do not chain: a {tuple(a_RI.shape)} should be (R, I), b {tuple(b_OR.shape)} should be (O, R)"
    )
    return frame(b_OR, exact), frame(a_RI.mT, exact)


def column_signs(u_OK: Tensor) -> Tensor:
    """+1 or -1 for each column: the sign of its entry of largest size."""
    above_K, below_K = u_OK.amax(dim=0), -u_OK.amin(dim=0)  # a tenth of the time of argmax
    sign_K = torch.where(below_K > above_K, -1.0, 1.0)
    if (tied_K := above_K == below_K).any():  # then the first of them decides, and u and -u still give opposite signs
        first_K = (u_OK[:, tied_K].abs() == above_K[tied_K]).byte().argmax(dim=0, keepdim=True)
        sign_K[tied_K] = torch.where(u_OK[:, tied_K].gather(0, first_K)[0] < 0, -1.0, 1.0)
    return sign_K.to(u_OK.dtype)
