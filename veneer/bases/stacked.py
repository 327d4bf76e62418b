"""The plain storage of a layer's experts: one matrix of three dimensions, as transformers holds it.

Legend: E experts, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.bases.base import Base, frozen


class Stacked(Base):
    """Dense frozen weights of all experts, W (E, O, I); `weight` is the model's own parameter, (E, I, O) if transposed.

    To ask and to replace as a whole: the products are of rows with the expert of each (`veneer.kernels.grouped`).
    """

    storage = "dense"

    def __init__(self, weight: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.transposed = weight, None, transposed
        _, self.out_features, self.in_features = self.w_EOI.shape

    @property
    def w_EOI(self) -> Tensor:
        return self.weight.mT if self.transposed else self.weight

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.w_EOI.detach().to(dtype or self.dtype)

    def dense(self) -> Tensor:
        return self.w_EOI.detach().to(torch.float32, copy=True)

    def packed(self, w_EOI: Tensor) -> Stacked:
        if w_EOI.shape != self.w_EOI.shape:
            raise ValueError(f"packed: got {tuple(w_EOI.shape)}, wanted {tuple(self.w_EOI.shape)}")
        stored = w_EOI.detach().mT if self.transposed else w_EOI.detach()
        held = stored.to(self.device, self.dtype, copy=True, memory_format=torch.contiguous_format)
        return Stacked(frozen(held), self.transposed)
