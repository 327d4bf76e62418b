"""How alike two updates of one weight are.

Shapes: a_RI, b_OR with I inputs, O outputs, R rank; the ranks of the two may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.lowrank.spectrum import norm, svd
from veneer.lowrank.truncation import NEGLIGIBLE


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


def inner(a1_RI: Tensor, b1_OR: Tensor, a2_RI: Tensor, b2_OR: Tensor) -> float:
    """<B₁A₁, B₂A₂> = tr((B₁ᵀB₂)(A₂A₁ᵀ)); the ranks may differ."""
    outputs_RR = b1_OR.double().mT @ b2_OR.double()
    inputs_RR = a1_RI.double() @ a2_RI.double().mT
    return float((outputs_RR * inputs_RR).sum())


def cosine(a1_RI: Tensor, b1_OR: Tensor, a2_RI: Tensor, b2_OR: Tensor) -> float:
    """<ΔW₁, ΔW₂> / (|ΔW₁| |ΔW₂|), in [-1, 1]; 0 where one of them is zero."""
    norms = norm(a1_RI, b1_OR) * norm(a2_RI, b2_OR)
    found = inner(a1_RI, b1_OR, a2_RI, b2_OR) / norms if norms else 0.0
    return max(-1.0, min(1.0, found))


def principal_angles(a1_RI: Tensor, b1_OR: Tensor, a2_RI: Tensor, b2_OR: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the min(K₁, K₂) principal angles between what they write, and between what they read.

    float64, largest first, in [0, 1]; empty where one update is zero. Directions that are rounding do not count.
    """
    _check_same_weight(a1_RI, b1_OR, a2_RI, b2_OR)
    u1_OK, v1_IK = directions(a1_RI, b1_OR)
    u2_OK, v2_IK = directions(a2_RI, b2_OR)
    return _cosines(u1_OK, u2_OK), _cosines(v1_IK, v2_IK)


def overlap(a1_RI: Tensor, b1_OR: Tensor, a2_RI: Tensor, b2_OR: Tensor) -> Overlap:
    """Cosine of two updates of one weight and the overlap of the spaces they write to and read from."""
    _check_same_weight(a1_RI, b1_OR, a2_RI, b2_OR)
    u1_OK, v1_IK = directions(a1_RI, b1_OR)
    u2_OK, v2_IK = directions(a2_RI, b2_OR)
    larger = max(u1_OK.shape[1], u2_OK.shape[1])
    return Overlap(
        cosine=cosine(a1_RI, b1_OR, a2_RI, b2_OR),
        output=_shared(_cosines(u1_OK, u2_OK)),
        input=_shared(_cosines(v1_IK, v2_IK)),
        output_chance=larger / b1_OR.shape[0],
        input_chance=larger / a1_RI.shape[1],
    )


def _check_same_weight(a1_RI: Tensor, b1_OR: Tensor, a2_RI: Tensor, b2_OR: Tensor) -> None:
    assert a1_RI.shape[1] == a2_RI.shape[1] and b1_OR.shape[0] == b2_OR.shape[0], (
        f"updates of different weights: {b1_OR.shape[0]} x {a1_RI.shape[1]} and {b2_OR.shape[0]} x {a2_RI.shape[1]}"
    )


def directions(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """U (O, K') and V (I, K'), orthonormal: what B·A writes and what it reads, without what is rounding; float64."""
    u_OK, s_K, v_IK = svd(a_RI, b_OR)
    kept_K = (s_K > NEGLIGIBLE * s_K[:1]) & (s_K > 0)
    return u_OK[:, kept_K], v_IK[:, kept_K]


def _cosines(q1_NK: Tensor, q2_NK: Tensor) -> Tensor:
    """Of the principal angles between two orthonormal bases of N-dimensional vectors."""
    return torch.linalg.svdvals(q1_NK.mT @ q2_NK).clamp(max=1.0)


def _shared(cosines: Tensor) -> float:
    """Mean square; 0 where there is none."""
    return float(cosines.square().mean()) if len(cosines) else 0.0
