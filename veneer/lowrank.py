"""Maths of a low-rank update ΔW = B·A, from its factors alone: B·A is never formed.

Two thin QR factorisations leave all that matters in one small core matrix:

    B = Q_b R_b,   Aᵀ = Q_a R_a   =>   B·A = Q_b (R_b R_aᵀ) Q_aᵀ

The singular values of ΔW are those of the core, so at rank 16 any weight costs the SVD of a 16 x 16 matrix.
Everything is computed in float64. Results depend on ΔW, not on how it happens to be split into B and A.

Shapes: a_RI, b_OR with I inputs, O outputs, R rank; K = min(O, I, R), the most directions that ΔW can have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Directions weaker than this part of the strongest one are rounding of float32 factors, not something learned.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Overlap:
    """How alike two updates of one weight are; all but `cosine` lie in [0, 1].

    cosine          <ΔW₁, ΔW₂> / (|ΔW₁| |ΔW₂|), in [-1, 1]; 0 where one of them is zero
    output          shared part of the column spaces (what they write), |U₁ᵀU₂|² / min(K₁, K₂), as in LoRA
                    (arXiv:2106.09685, section 7.2): 1 = one space lies in the other, 0 = orthogonal
    input           the same for the row spaces (what they read)
    output_chance   what two random spaces of these sizes would share on average, max(K₁, K₂) / O
    input_chance    max(K₁, K₂) / I
    """

    cosine: float
    output: float
    input: float
    output_chance: float
    input_chance: float


def norm(a_RI: Tensor, b_OR: Tensor) -> float:
    """Frobenius norm of B·A."""
    return float(torch.linalg.matrix_norm(_core(a_RI, b_OR)[1]))


def singular_values(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """The min(O, I, R) singular values of B·A that can differ from zero, largest first; float64."""
    return svd(a_RI, b_OR)[1]


def svd(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, K), s (K,), V (I, K) with B·A = U diag(s) Vᵀ, s largest first; float64.

    Signs are fixed (the entry of largest size in each column of U is positive), so separated singular values give
    the same U and V for every factorisation of the same ΔW.
    """
    q_OK, core, q_IK = _core(a_RI, b_OR)
    left, s_K, right_t = torch.linalg.svd(core, full_matrices=False)
    u_OK, v_IK = q_OK @ left, q_IK @ right_t.mT
    sign_K = _column_signs(u_OK)
    return u_OK * sign_K, s_K, v_IK * sign_K


def truncate(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of B·A of at most `rank` (Eckart-Young), balanced, in the input's dtype.

    Returns a (rank, I), b (O, rank), or R rows where R < rank; rows that ΔW has no direction for are zero. The
    Frobenius error is the root of the summed squares of the singular values left out.
    """
    assert rank >= 1, f"rank must be at least 1, got {rank}"
    rank = min(rank, a_RI.shape[0])
    u_OK, s_K, v_IK = svd(a_RI, b_OR)
    root_K = s_K.sqrt()[:rank]
    a, b = (v_IK[:, :rank] * root_K).mT, u_OK[:, :rank] * root_K
    missing = rank - root_K.numel()  # only where R > min(O, I)
    a = torch.nn.functional.pad(a, (0, 0, 0, missing))
    b = torch.nn.functional.pad(b, (0, missing))
    return a.to(a_RI.dtype).contiguous(), b.to(b_OR.dtype).contiguous()


def balanced(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """The canonical factors of the same B·A at the same rank: A = √s Vᵀ, B = U √s.

    AAᵀ = BᵀB = diag(s). Unique up to rounding where the singular values are separated, so whatever is computed from
    these factors does not depend on the ones that came in.
    """
    return truncate(a_RI, b_OR, a_RI.shape[0])


def inner(a1_RI: Tensor, b1_OR: Tensor, a2_RI: Tensor, b2_OR: Tensor) -> float:
    """<B₁A₁, B₂A₂> = tr((B₁ᵀB₂)(A₂A₁ᵀ)); the ranks may differ."""
    outputs_RR = b1_OR.double().mT @ b2_OR.double()
    inputs_RR = a1_RI.double() @ a2_RI.double().mT
    return float((outputs_RR * inputs_RR).sum())


def overlap(a1_RI: Tensor, b1_OR: Tensor, a2_RI: Tensor, b2_OR: Tensor) -> Overlap:
    """Cosine of two updates of one weight and the overlap of the spaces they write to and read from."""
    assert a1_RI.shape[1] == a2_RI.shape[1] and b1_OR.shape[0] == b2_OR.shape[0], (
        f"updates of different weights: {b1_OR.shape[0]} x {a1_RI.shape[1]} and {b2_OR.shape[0]} x {a2_RI.shape[1]}"
    )
    u1_OK, v1_IK = _directions(a1_RI, b1_OR)
    u2_OK, v2_IK = _directions(a2_RI, b2_OR)
    norms = norm(a1_RI, b1_OR) * norm(a2_RI, b2_OR)
    cosine = inner(a1_RI, b1_OR, a2_RI, b2_OR) / norms if norms else 0.0
    larger = max(u1_OK.shape[1], u2_OK.shape[1])
    return Overlap(
        cosine=max(-1.0, min(1.0, cosine)),
        output=_shared(u1_OK, u2_OK),
        input=_shared(v1_IK, v2_IK),
        output_chance=larger / b1_OR.shape[0],
        input_chance=larger / a1_RI.shape[1],
    )


def effective_rank(a_RI: Tensor, b_OR: Tensor) -> float:
    """exp of the entropy of s / Σs (Roy and Vetterli, 2007), counted in directions.

    K for K equal singular values, 1 for a single one, 0 for ΔW = 0.
    """
    s_K = singular_values(a_RI, b_OR)
    total = float(s_K.sum())
    if total == 0.0:
        return 0.0
    return math.exp(float(torch.special.entr(s_K / total).sum()))


def _core(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q_b (O, min(O, R)), core (min(O, R), min(I, R)), Q_a (I, min(I, R)); float64."""
    assert a_RI.ndim == b_OR.ndim == 2 and a_RI.shape[0] == b_OR.shape[1], (
        f"factors do not chain: a {tuple(a_RI.shape)} should be (R, I), b {tuple(b_OR.shape)} should be (O, R)"
    )
    q_b, r_b = torch.linalg.qr(b_OR.double())
    q_a, r_a = torch.linalg.qr(a_RI.double().mT)
    return q_b, r_b @ r_a.mT, q_a


def _column_signs(u_OK: Tensor) -> Tensor:
    """+1 or -1 for each column: the sign of its entry of largest size."""
    largest_K = u_OK.abs().argmax(dim=0, keepdim=True)
    return torch.where(u_OK.gather(0, largest_K)[0] < 0, -1.0, 1.0).to(u_OK.dtype)


def _directions(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """U (O, K') and V (I, K'): the directions of B·A that are more than rounding."""
    u_OK, s_K, v_IK = svd(a_RI, b_OR)
    kept_K = (s_K > NEGLIGIBLE * s_K[0]) & (s_K > 0)
    return u_OK[:, kept_K], v_IK[:, kept_K]


def _shared(q1_NK: Tensor, q2_NK: Tensor) -> float:
    """Mean squared cosine of the principal angles between two orthonormal bases of N-dimensional vectors."""
    smaller = min(q1_NK.shape[1], q2_NK.shape[1])
    if smaller == 0:
        return 0.0
    return min(1.0, float((q1_NK.mT @ q2_NK).square().sum()) / smaller)
