"""The contract of a method: what a low-rank update adds to one layer.

Legend: T tokens, I in, O out, R rank.

Laws (tests/contract/test_methods.py), at dropout 0: `merged` equals `delta`; a new method starts as the base;
`plain` acts the same; `tensors` and `from_tensors` are inverse; the base is never changed; the state is only what is
learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.errors import NotMergeable

Self = TypeVar("Self", bound="Method")


class Method(nn.Module):
    """The update of one layer in one slot. The base is passed in, never owned."""

    name: ClassVar[str]  # in METHODS
    kinds: ClassVar[tuple[str, ...]]  # names of what `tensors` gives
    dropout: float = 0.0
    scale: float  # s, of training; folded into what `tensors` and `plain` give

    @property
    def rank(self) -> int:
        """R of what `tensors` gives."""
        raise NotImplementedError

    def delta(self, x_TI: Tensor, y_TO: Tensor, base: Base, gate_TR: Tensor | None = None) -> Tensor:
        """Δ (T, O) to add to y, the base's output without bias; in x's dtype.

        gate_TR: an optional factor for each token and rank (routing), applied between the two products. Raises
        ValueError where the method is not a sum over ranks.
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

    def tensors(self) -> dict[str, Tensor]:
        """What an adapter keeps, float32 copies: a (R, I), b (O, R) with the scale folded in, and what more `kinds`
        names."""
        raise NotImplementedError

    @classmethod
    def from_tensors(cls: type[Self], tensors: Mapping[str, Tensor], scale: float, dropout: float = 0.0) -> Self:
        """The method whose `tensors` are these: the scale is divided out, so that training can go on with it."""
        raise NotImplementedError

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave, into the parameters' own memory. Raises ValueError on other shapes."""
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        if found != wanted:
            raise ValueError(f"got {found}, wanted {wanted}")
        self.load_state_dict(type(self).from_tensors(tensors, self.scale).state_dict())

    def update_norm(self, base: Base) -> float:
        """‖W' - W‖ (Frobenius)."""
        return torch.linalg.vector_norm(self.merged(base) - base.dense()).item()
