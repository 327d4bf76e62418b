"""LoRA with a bias learned beside it, in PEFT's two ways: read, trained on and written, so that nothing of it is lost.

Legend: T tokens, I in, O out, R rank.

`lora_bias` adds s·c to B A x; `bias="lora_only"` puts a bias in the place of the layer's own. Neither is part of a
weight, so neither merges into one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.errors import NotMergeable
from veneer.lowrank import norm
from veneer.methods.base import Method

Self = TypeVar("Self", bound="BiasedLoRA")


class BiasedLoRA(Method):
    """Factors a (R, I), b (O, R), a bias c (O), float32, and a constant scale s: Δ = s · (x A' B' + c)."""

    name = "biased"
    kinds = ("a", "b", "c")

    def __init__(self, a_RI: Tensor, b_OR: Tensor, c_O: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a_RI, self.b_OR, self.c_O = nn.Parameter(a_RI), nn.Parameter(b_OR), nn.Parameter(c_O)
        self.scale, self.dropout = float(scale), float(dropout)

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def offset(self, base: Base) -> Tensor:
        """What is added to every token's output, (O) in float32."""
        return self.c_O * self.scale

    def delta(self, x_TI: Tensor, y_TO: Tensor, base: Base, gate_TR: Tensor | None = None) -> Tensor:
        """Raises ValueError with a gate: the bias is of no rank."""
        if gate_TR is not None:
            raise ValueError("a LoRA with a bias cannot be gated by rank: the bias is of no rank")
        thin_TO = (x_TI @ self.a_RI.to(x_TI.dtype).t()) @ self.b_OR.to(x_TI.dtype).t()
        return thin_TO * self.scale + self.offset(base).to(x_TI.dtype)

    def merged(self, base: Base) -> Tensor:
        raise NotMergeable("this LoRA has learned a bias, which is no part of a weight; keep it as an adapter")

    def tensors(self) -> dict[str, Tensor]:
        a_RI = self.a_RI.detach().to(torch.float32, copy=True)
        return {"a": a_RI, "b": self.b_OR.detach() * self.scale, self.kinds[2]: self._kept()}

    def _kept(self) -> Tensor:
        return self.c_O.detach() * self.scale

    @classmethod
    def from_tensors(cls: type[Self], tensors: Mapping[str, Tensor], scale: float, dropout: float = 0.0) -> Self:
        c_O = tensors["c"].to(torch.float32) / scale
        return cls(
            tensors["a"].to(torch.float32, copy=True), tensors["b"].to(torch.float32) / scale, c_O, scale, dropout
        )

    def update_norm(self, base: Base) -> float:
        """Of the weight's update; the bias has no place in it."""
        return norm(self.a_RI.detach(), self.b_OR.detach() * self.scale)


class RebiasedLoRA(BiasedLoRA):
    """Its c is the layer's bias instead of the base's: Δ = s · x A' B' + c - bias."""

    name = "rebiased"
    kinds = ("a", "b", "o")

    def offset(self, base: Base) -> Tensor:
        return self.c_O if base.bias is None else self.c_O - base.bias

    def _kept(self) -> Tensor:
        return self.c_O.detach().clone()

    @classmethod
    def from_tensors(cls: type[Self], tensors: Mapping[str, Tensor], scale: float, dropout: float = 0.0) -> Self:
        a_RI, c_O = (tensors[kind].to(torch.float32, copy=True) for kind in ("a", "o"))
        return cls(a_RI, tensors["b"].to(torch.float32) / scale, c_O, scale, dropout)
