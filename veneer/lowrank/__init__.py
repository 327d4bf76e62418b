"""Maths of low-rank updates ΔW = B·A, from their factors alone: B·A is never formed.

Orthonormal bases of what B writes and of what A reads leave all that matters in one small core matrix:

    B = Q_b R_b,   Aᵀ = Q_a R_a   =>   B·A = Q_b (R_b R_aᵀ) Q_aᵀ

The singular values of ΔW are those of the core, so at rank 16 any weight costs the SVD of a 16 x 16 matrix. Results
depend on ΔW, not on how it happens to be split into B and A.

Shapes: a_RI, b_OR with I inputs, O outputs, R rank; K = min(O, I, R), the most directions that ΔW can have.
"""

from veneer.lowrank.algebra import Factors, add, concatenate, scale, subtract, without_zeros
from veneer.lowrank.dense import Nearest, nearest
from veneer.lowrank.frame import Frame, frame
from veneer.lowrank.overlap import Overlap, cosine, directions, inner, overlap, principal_angles
from veneer.lowrank.spectrum import effective_rank, norm, singular_values, svd, svd_each
from veneer.lowrank.truncation import NEGLIGIBLE, Truncated, balanced, truncate

__all__ = [
    "NEGLIGIBLE",
    "Factors",
    "Frame",
    "Nearest",
    "Overlap",
    "Truncated",
    "add",
    "balanced",
    "concatenate",
    "cosine",
    "directions",
    "effective_rank",
    "frame",
    "inner",
    "nearest",
    "norm",
    "overlap",
    "principal_angles",
    "scale",
    "singular_values",
    "subtract",
    "svd",
    "svd_each",
    "truncate",
    "without_zeros",
]
