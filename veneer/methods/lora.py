"""LoRA (Hu et al. 2021, arXiv 2106.09685): Δ = s · x A' B', with s = alpha/r, alpha/√r (2312.03732), or given.

Legend: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.lowrank import norm
from veneer.methods.base import Method


class LoRA(Method):
    """Factors a (R, I), b (O, R), float32, and a constant scale s.

    s stays apart while training, because folding it in would change Adam's steps; `plain` folds it once.
    """

    name = "lora"
    kinds = ("a", "b")

    def __init__(self, a_RI: Tensor, b_OR: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a_RI, self.b_OR = nn.Parameter(a_RI), nn.Parameter(b_OR)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def pair(self) -> tuple[Tensor, Tensor]:
        """a (R, I), b (O, R), differentiable, so that Δ = s · x A' B': what the fused operation is given."""
        return self.a_RI, self.b_OR

    def delta(self, x_TI: Tensor, y_TO: Tensor, base: Base, gate_TR: Tensor | None = None) -> Tensor:
        a_RI, b_OR = self.pair()
        z_TR = x_TI @ a_RI.to(x_TI.dtype).t()
        z_TR = z_TR if gate_TR is None else z_TR * gate_TR
        return (z_TR @ b_OR.to(x_TI.dtype).t()) * self.scale

    def merged(self, base: Base) -> Tensor:
        a_RI, b_OR = self.plain()
        return base.dense().addmm_(b_OR, a_RI)

    def plain(self) -> tuple[Tensor, Tensor]:
        a_RI, b_OR = self.pair()
        return a_RI.detach().to(torch.float32, copy=True), b_OR.detach().to(torch.float32) * self.scale

    def update_norm(self, base: Base) -> float:
        return norm(*self.plain())

    def tensors(self) -> dict[str, Tensor]:
        a_RI, b_OR = self.plain()
        return {"a": a_RI, "b": b_OR}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scale: float, dropout: float = 0.0) -> LoRA:
        return cls(tensors["a"].to(torch.float32, copy=True), tensors["b"].to(torch.float32) / scale, scale, dropout)
