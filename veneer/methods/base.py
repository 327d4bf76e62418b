"""The contract of a method: what a low-rank update adds to one layer.

Legend: T tokens, I in, O out, R rank.

Laws (tests/contract/test_methods.py), at dropout 0: `merged` equals `delta`; a new method starts as the base;
`plain` acts the same; the base is never changed; the state is only what is learned.
"""

from __future__ import annotations

from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.errors import NotMergeable


class Method(nn.Module):
    """The update of one layer in one slot. The base is passed in, never owned."""

    dropout: float = 0.0

    def delta(self, x_TI: Tensor, y_TO: Tensor, base: Base, gate_TR: Tensor | None = None) -> Tensor:
        """Δ (T, O) to add to y, the base's output without bias; in x's dtype.

        gate_TR: an optional factor for each token and rank (routing), applied between the two products.
        """
        raise NotImplementedError

    def merged(self, base: Base) -> Tensor:
        """The weight W' that acts like base and update together, (O, I) in float32, a new tensor.

        Raises NotMergeable where no such weight exists.
        """
        raise NotMergeable(f"{type(self).__name__} has no exact merged form; keep it as an adapter")

    def plain(self) -> tuple[Tensor, Tensor]:
        """Factors a (R, I), b (O, R) in float32, scale folded in, so that Δ = x A' B'.

        Raises NotMergeable where the method has no exact plain form.
        """
        raise NotMergeable(f"{type(self).__name__} has no exact plain LoRA form")
