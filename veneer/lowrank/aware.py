"""The best approximation of what an update does to given inputs, at a lower rank: activation-aware truncation.

Legend: I in, O out, R rank, K directions, r the rank that is kept.

Eckart-Young minimises ‖ΔW - ΔW'‖, as if all inputs were alike. With G = E[q qᵀ] of the inputs in an orthonormal basis
of what A reads, E‖(ΔW - ΔW') x‖² = ‖(C - C') G^½‖² for the core C of ΔW, so the best ΔW' keeps the strongest r left
singular vectors of C G^½: the principal directions of the outputs (SVD-LLM, Wang et al. 2024, arXiv 2403.07378, with
whitening by Cholesky factors and their inverse; a projection needs neither, and no full-rank G).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.lowrank.frame import frame
from veneer.lowrank.truncation import truncate

# Of the mean of G's diagonal, added to it: directions that no input has are chosen by their size in the weights.
UNSEEN = 1e-6


class AwareCut(NamedTuple):
    """Canonical factors (r, I) and (O, r) of what is left.

    s: all K singular values of what was cut from. error: Frobenius norm of what was left out. output_kept: share of
    E‖ΔW x‖² that is left, output_kept_plain: what a cut by weights alone would have left. tied: whether the choice of
    the last direction was a matter of rounding.
    """

    a: Tensor
    b: Tensor
    s: Tensor
    error: float
    output_kept: float
    output_kept_plain: float
    tied: bool


def reading_basis(a_RI: Tensor) -> Tensor:
    """The orthonormal basis (I, K) in which `truncate_aware` wants the inputs, float64."""
    found = frame(a_RI.mT, exact=True)
    return found.lift(torch.eye(len(found.coords_KR), dtype=torch.float64))


def truncate_aware(a_RI: Tensor, b_OR: Tensor, gram_KK: Tensor, rank: int) -> AwareCut:
    """At most `rank` directions; gram_KK: mean of q qᵀ over tokens, q = reading_basis(a)ᵀ x."""
    left, right = frame(b_OR, exact=True), frame(a_RI.mT, exact=True)
    core_KK = left.coords_KR @ right.coords_KR.mT
    unseen = UNSEEN * float(gram_KK.diagonal().mean()) or 1.0
    gram_KK = gram_KK.double() + unseen * torch.eye(len(gram_KK), dtype=torch.float64)
    output_KK = core_KK @ gram_KK @ core_KK.mT  # second moments of the outputs
    u_KK, s_K, _ = torch.linalg.svd(core_KK @ _root(gram_KK), full_matrices=False)
    u_Kr = u_KK[:, :rank]
    kept = truncate((u_Kr.mT @ core_KK @ right.lift(torch.eye(len(gram_KK), dtype=torch.float64)).mT), left.lift(u_Kr))
    plain_KK, all_K, _ = torch.linalg.svd(core_KK)
    error = float(torch.linalg.matrix_norm(core_KK - u_Kr @ (u_Kr.mT @ core_KK)))
    whole = float(output_KK.trace())
    aware, plain = (float((u.mT @ output_KK @ u).trace()) / whole if whole else 1.0 for u in (u_Kr, plain_KK[:, :rank]))
    tied = rank < len(s_K) and bool(s_K[rank - 1] - s_K[rank] < 1e-6 * s_K[rank - 1])
    return AwareCut(kept.a, kept.b, all_K, error, aware, plain, tied)


def _root(gram_KK: Tensor) -> Tensor:
    """A symmetric square root."""
    size_K, v_KK = torch.linalg.eigh(gram_KK)
    return (v_KK * size_K.clamp(min=0).sqrt()) @ v_KK.mT
