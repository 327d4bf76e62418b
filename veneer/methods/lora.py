"""LoRA (Hu et al. 2021, arXiv 2106.09685): Δ = s · x A' B', with s = alpha/r, alpha/√r (2312.03732), or given.

Legend: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.methods.base import Method


class LoRA(Method):
    """Factors a (R, I), b (O, R), float32, and a constant scale s.

    s stays apart while training, because folding it in would change Adam's steps; `plain` folds it once.
    """

    def __init__(self, a_RI: Tensor, b_OR: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a_RI, self.b_OR = nn.Parameter(a_RI), nn.Parameter(b_OR)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def delta(self, x_TI: Tensor, y_TO: Tensor, base: Base, gate_TR: Tensor | None = None) -> Tensor:
        z_TR = x_TI @ self.a_RI.to(x_TI.dtype).t()
        z_TR = z_TR if gate_TR is None else z_TR * gate_TR
        return (z_TR @ self.b_OR.to(x_TI.dtype).t()) * self.scale

    def merged(self, base: Base) -> Tensor:
        a_RI, b_OR = self.plain()
        return base.dense().addmm_(b_OR, a_RI)

    def plain(self) -> tuple[Tensor, Tensor]:
        a_RI = self.a_RI.detach().to(torch.float32, copy=True)
        return a_RI, self.b_OR.detach().to(torch.float32) * self.scale

    @classmethod
    def from_plain(cls, a_RI: Tensor, b_OR: Tensor, scale: float = 1.0, dropout: float = 0.0) -> LoRA:
        """The method whose `plain` is (a, b): the scale is divided out of b, so that training can go on with it."""
        return cls(a_RI.to(torch.float32, copy=True), b_OR.to(torch.float32) / scale, scale, dropout)
