"""DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m ∘ (W + s B A) / c, with c the norm of each row, m learned.

Legend: T tokens, I in, O out, R rank.

c is a constant in backward, as in the paper (section 4.3). It is not taken of W + s B A, which would be made for it at
every call, but row by row of c² = ‖W‖² + 2s B·(W A') + s² B (A A') B': a product over R rows beside one over T.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.methods.base import Method


class DoRA(Method):
    """Factors a (R, I), b (O, R), magnitudes m (O), float32, and a constant scale s."""

    name = "dora"
    kinds = ("a", "b", "m")

    def __init__(self, a_RI: Tensor, b_OR: Tensor, m_O: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a_RI, self.b_OR, self.m_O = nn.Parameter(a_RI), nn.Parameter(b_OR), nn.Parameter(m_O)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    @torch.no_grad()
    def norms(self, base: Base) -> Tensor:
        """c, the norm of every row of W + s B A, (O) in float32."""
        a_RI, b_OR = self.a_RI, self.b_OR * self.scale
        crossed_O = (b_OR * base.matmul(a_RI).t()).sum(1)
        own_O = ((b_OR @ (a_RI @ a_RI.t())) * b_OR).sum(1)
        squares_O = base.row_norms().square() + (2 * crossed_O + own_O)
        return squares_O.clamp_min(0).sqrt()

    def _factor(self, base: Base) -> Tensor:
        """m / c; a row of zeros has no direction, and stays zeros."""
        return self.m_O / self.norms(base).clamp_min(torch.finfo(torch.float32).tiny)

    def delta(self, x_TI: Tensor, y_TO: Tensor, base: Base, gate_TR: Tensor | None = None) -> Tensor:
        """Raises ValueError with a gate: the magnitude is one of all ranks together."""
        if gate_TR is not None:
            raise ValueError("DoRA cannot be gated by rank: its magnitude is of all ranks together")
        factor_O, dtype = self._factor(base), x_TI.dtype
        thin_TO = (x_TI @ self.a_RI.to(dtype).t()) @ self.b_OR.to(dtype).t()
        return y_TO * (factor_O - 1).to(dtype) + thin_TO * (factor_O * self.scale).to(dtype)

    def merged(self, base: Base) -> Tensor:
        sum_OI = base.dense().addmm_(self.b_OR.detach() * self.scale, self.a_RI.detach())
        return sum_OI.mul_(self._factor(base).detach()[:, None])

    def tensors(self) -> dict[str, Tensor]:
        a_RI, m_O = (tensor.detach().to(torch.float32, copy=True) for tensor in (self.a_RI, self.m_O))
        return {"a": a_RI, "b": self.b_OR.detach().to(torch.float32) * self.scale, "m": m_O}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scale: float, dropout: float = 0.0) -> DoRA:
        a_RI, m_O = (tensors[kind].to(torch.float32, copy=True) for kind in ("a", "m"))
        return cls(a_RI, tensors["b"].to(torch.float32) / scale, m_O, scale, dropout)
