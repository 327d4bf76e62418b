"""Stands for a base whose product nobody will read, so that it need not be computed.

Legend: T tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.bases.base import Base


class Unread:
    """Gives NaN for x W', which whoever reads it after all cannot overlook; everything else is the base's own."""

    adds = True

    def __init__(self, base: Base) -> None:
        self.base, self.bias = base, base.bias

    def matmul(self, x_TI: Tensor, into: Tensor | None = None) -> Tensor:
        if into is not None:
            return into.fill_(torch.nan)
        return x_TI.new_full((len(x_TI), self.base.out_features), torch.nan)

    @classmethod
    def matmuls(cls, bases: Sequence[Unread], x_TI: Tensor, intos: Sequence[Tensor | None]) -> list[Tensor]:
        return [base.matmul(x_TI, into) for base, into in zip(bases, intos, strict=True)]

    def matmul_t(self, g_TO: Tensor, into: Tensor | None = None) -> Tensor:
        return self.base.matmul_t(g_TO, into)
