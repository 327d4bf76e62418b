"""The plain storage: W as it is, in float32, bfloat16 or float16.

Legend: T tokens, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.bases.base import Base, check_weight, frozen


class Dense(Base):
    """A dense frozen weight (O, I)."""

    storage = "dense"

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @classmethod
    def from_weight(cls, weight_OI: Tensor, bias_O: Tensor | None = None) -> Dense:
        check_weight(cls.storage, weight_OI)
        return cls(frozen(weight_OI), None if bias_O is None else frozen(bias_O))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Dense:
        return cls(linear.weight, linear.bias)

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Dense:
        weight = frozen(torch.empty(out_features, in_features, dtype=dtype, device=device))
        return cls(weight, frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None)

    def matmul(self, x_TI: Tensor, into: Tensor | None = None) -> Tensor:
        if into is not None and into.dtype == x_TI.dtype == self.weight.dtype:
            return into.addmm_(x_TI, self.weight.t())
        product_TO = torch.mm(x_TI.to(self.weight.dtype), self.weight.t()).to(x_TI.dtype)
        return product_TO if into is None else into.add_(product_TO)

    def matmul_t(self, g_TO: Tensor, into: Tensor | None = None) -> Tensor:
        if into is not None and into.dtype == g_TO.dtype == self.weight.dtype:
            return into.addmm_(g_TO, self.weight)
        product_TI = torch.mm(g_TO.to(self.weight.dtype), self.weight).to(g_TO.dtype)
        return product_TI if into is None else into.add_(product_TI)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.detach().to(dtype or self.dtype)

    def dense(self) -> Tensor:
        return self.weight.detach().to(torch.float32, copy=True)
