"""One flat buffer for all factors of an adapter, and AdamW over it.

Legend: P parameters of the adapter.

420 small tensors would be 420 small updates and norms; flat, each is one. A gradient all-reduce is one too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer.config import TrainSettings


class FlatParameters:
    """The parameters given become views of `values_P`, their gradients views of `grads_P`."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        first = parameters[0]
        total = sum(parameter.numel() for parameter in parameters)
        self.values_P = nn.Parameter(torch.empty(total, dtype=torch.float32, device=first.device))
        self.grads_P = torch.zeros(total, dtype=torch.float32, device=first.device)
        self.values_P.grad = self.grads_P
        start = 0
        for parameter in parameters:
            stop = start + parameter.numel()
            self.values_P.data[start:stop].copy_(parameter.data.reshape(-1))
            parameter.data = self.values_P.data[start:stop].view_as(parameter)
            parameter.grad = self.grads_P[start:stop].view_as(parameter)
            start = stop

    def __len__(self) -> int:
        return self.values_P.numel()

    def clip(self, max_norm: float) -> Tensor:
        """The gradient's norm before clipping, a scalar tensor; 0 never clips."""
        norm = torch.linalg.vector_norm(self.grads_P)
        if max_norm > 0:
            self.grads_P.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def adamw(flat: FlatParameters, settings: TrainSettings) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov & Hutter, arXiv 1711.05101) over the flat tensor; the rate is set each step."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(
        [flat.values_P], lr=0.0, betas=betas, eps=settings.adam_epsilon, weight_decay=settings.weight_decay, fused=True
    )
