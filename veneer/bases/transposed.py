"""The plain storage of a layer whose checkpoint holds W' (I, O): transformers' `Conv1D`, the layers of GPT-2.

Legend: I in, O out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from veneer.bases.base import check_weight, frozen
from veneer.bases.dense import Dense


class Transposed(Dense):
    """`weight` (O, I) is a view of the checkpoint's tensor, which `state_dict` gives back as it was: (I, O)."""

    @classmethod
    def from_weight(cls, weight_OI: Tensor, bias_O: Tensor | None = None) -> Transposed:
        check_weight(cls.storage, weight_OI)
        return cls(frozen(weight_OI.t().contiguous().t()), None if bias_O is None else frozen(bias_O))

    @classmethod
    def from_linear(cls, linear: Any) -> Transposed:
        """Of a module whose weight is (I, O)."""
        return cls(frozen(linear.weight.t()), linear.bias)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        name = f"{prefix}weight"
        given = {**state_dict, name: state_dict[name].t()} if name in state_dict else state_dict
        super()._load_from_state_dict(given, prefix, *rest)
