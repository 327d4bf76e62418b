"""The plain storage of an embedding: a linear layer over one-hot tokens, whose checkpoint holds W' (V, D).

Legend: V vocabulary, D hidden size; as a base O is D and I is V.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.bases.base import check_weight, frozen
from veneer.bases.dense import Dense


class Lookup(Dense):
    """`weight` (V, D) is the embedding's own tensor: a vocabulary head may be tied to it."""

    def __init__(self, weight: nn.Parameter, bias: None = None) -> None:
        super().__init__(weight)
        self.in_features, self.out_features = weight.shape

    @classmethod
    def from_weight(cls, weight_OI: Tensor, bias_O: Tensor | None = None) -> Lookup:
        check_weight(cls.storage, weight_OI)
        return cls(frozen(weight_OI.t().contiguous()))

    @classmethod
    def from_embedding(cls, embedding: nn.Module) -> Lookup:
        """Takes over the weight, without a copy."""
        return cls(embedding.weight)

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Lookup:
        return cls(frozen(torch.empty(in_features, out_features, dtype=dtype, device=device)))

    def matmul(self, x_TI: Tensor, into: Tensor | None = None) -> Tensor:
        product_TO = torch.mm(x_TI.to(self.weight.dtype), self.weight).to(x_TI.dtype)
        return product_TO if into is None else into.add_(product_TO)

    def matmul_t(self, g_TO: Tensor, into: Tensor | None = None) -> Tensor:
        product_TI = torch.mm(g_TO.to(self.weight.dtype), self.weight.t()).to(g_TO.dtype)
        return product_TI if into is None else into.add_(product_TI)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.detach().t().to(dtype or self.dtype)

    def dense(self) -> Tensor:
        return self.weight.detach().t().to(torch.float32, copy=True)
