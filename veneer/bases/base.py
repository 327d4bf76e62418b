"""The contract of a storage: one frozen linear weight W (O, I).

Legend: T tokens, I in, O out.

A base gives the two products that training needs, forward and backward, and never a gradient of its own:
the fused layers in `veneer.kernels` call both directly, so a storage decides how each is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Base(nn.Module):
    """One frozen weight W (O, I) and its bias (O) or None."""

    bias: nn.Parameter | None
    in_features: int
    out_features: int

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Base:
        """Takes over the weight and bias of `linear`; where the storage is the linear's own, without a copy."""
        raise NotImplementedError

    def matmul(self, x_TI: Tensor) -> Tensor:
        """x W', (T, O) in x's dtype; not differentiable, without bias."""
        raise NotImplementedError

    def matmul_t(self, g_TO: Tensor, into: Tensor | None = None) -> Tensor:
        """g W, (T, I): the product of the backward pass. With `into`, added to it in place, and `into` comes back."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """W as a plain (O, I) tensor in float32, a copy."""
        raise NotImplementedError

    def row_norms(self) -> Tensor:
        """Euclidean norm of every output row, (O) in float32."""
        return torch.linalg.vector_norm(self.dense(), dim=1)

    def packed(self, w_OI: Tensor) -> Base:
        """Another weight of the same shape in the same storage; this one is unchanged."""
        raise NotImplementedError

    def linear(self, x: Tensor) -> Tensor:
        """x W' + bias for x (..., I), differentiable in x."""
        y = FrozenProduct.apply(x.reshape(-1, self.in_features), self)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


class FrozenProduct(torch.autograd.Function):
    """x W' with the gradient for x alone: W is frozen, so nothing else is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, base: Base) -> Tensor:
        ctx.base = base
        return base.matmul(x_TI)

    @staticmethod
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Any, ...]:
        return (ctx.base.matmul_t(g_TO) if ctx.needs_input_grad[0] else None), None
