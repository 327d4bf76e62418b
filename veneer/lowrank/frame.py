"""An orthonormal basis of the columns of a thin matrix, and the matrix in that basis: X = Q C.

Legend: N rows, R columns (N >> R), K <= R directions.

Householder QR in float32 spends most of its time on products of vectors, and more than half of it on writing Q out.
Where X is float32, its Gram matrix in float64 says as much: products of float32 numbers are exact there, and
squaring the condition number leaves 1e-16 · κ², less than float32's own rounding as long as κ < 1e4. Its Cholesky
factor is C, and Q = X C⁻¹ need not be formed. That is checked, and what is worse conditioned goes to QR in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Upper limit of |C⁻¹|² with columns of X of length 1, which bounds κ²/R: Q is then orthonormal to about 1e-8.
CONDITION = 1e7


@dataclass(frozen=True)
class Frame:
    """X = Q C with orthonormal Q (N, K); all float64. Of many matrices at once, each has a leading dimension more.

    coords_KR: C. Q itself is `x_NR @ inverse_RK`, or x_NR where that is None.
    """

    x_NR: Tensor
    inverse_RK: Tensor | None
    coords_KR: Tensor

    def lift(self, y_KD: Tensor) -> Tensor:
        """Q y, (N, D): columns given in the basis, as vectors of N entries."""
        return self.x_NR @ (y_KD if self.inverse_RK is None else self.inverse_RK @ y_KD)


def frame(x_NR: Tensor, exact: bool = False) -> Frame:
    """The basis and the coordinates of X, from its Gram matrix where that is safe and `exact` is not asked for.

    exact: Householder QR in float64, right to 1e-15 whatever the condition.
    """
    x_NR = x_NR.double()
    return (None if exact else _from_gram(x_NR)) or _from_qr(x_NR)


def _from_qr(x_NR: Tensor) -> Frame:
    q_NK, r_KR = torch.linalg.qr(x_NR)
    return Frame(q_NK, None, r_KR)


def _from_gram(x_NR: Tensor) -> Frame | None:
    """None where Q would not be orthonormal. Columns are taken at length 1 first, so that only angles count."""
    gram_RR = x_NR.mT @ x_NR
    size_R = gram_RR.diagonal(dim1=-2, dim2=-1).sqrt()
    lower_RR, failed = torch.linalg.cholesky_ex(gram_RR / size_R[..., None, :] / size_R[..., None])
    if failed.any() or not lower_RR.isfinite().all():  # not finite: a column of zeros
        return None
    eye_RR = torch.eye(lower_RR.shape[-1], dtype=lower_RR.dtype, device=lower_RR.device)
    inverse_RR = torch.linalg.solve_triangular(lower_RR, eye_RR, upper=False).mT
    if (inverse_RR.square().sum((-2, -1)) > CONDITION).any():
        return None
    return Frame(x_NR, inverse_RR / size_R[..., None], lower_RR.mT * size_R[..., None, :])
