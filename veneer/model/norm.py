"""RMSNorm as a leaf: the model's own arithmetic with a frozen weight, in one autograd step.

Legend: D hidden size. Source: Zhang & Sennrich 2019, arXiv 1910.07467; rounding as in transformers' Llama.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenRMSNorm(nn.Module):
    """w ∘ x / rms(x): statistics in float32, the normalised x rounded to x's dtype before the weight, as Llama does."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps
        weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        inverse = torch.rsqrt(torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, inverse, weight_D)
        return weight_D * (x32 * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, inverse, weight_D = ctx.saved_tensors
        gw = (g * weight_D).float()
        x_hat = x.float() * inverse
        mean = torch.linalg.vecdot(gw, x_hat).unsqueeze(-1).div_(x.shape[-1])
        return torch.addcmul(gw, x_hat, mean, value=-1).mul_(inverse).to(x.dtype), None, None
