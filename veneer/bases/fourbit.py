"""What the 4-bit storages share: codes over the flattened weight, a magnitude for every 64 elements.

Legend: I in, O out, P = ⌈OI/2⌉ bytes of two codes, K = ⌈OI/64⌉ blocks.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from veneer.bases.base import check_weight, frozen
from veneer.bases.quantised import Quantised, unset
from veneer.kernels.dequantise import dequantise_4bit
from veneer.kernels.fourbit import BLOCK, quantise_4bit
from veneer.kernels.nested import Nested

Self = TypeVar("Self", bound="FourBit")


class FourBit(Quantised):
    """Codes (P, 1) in uint8, magnitudes (K) in float32: any shape, 4.5 bits an element."""

    levels: ClassVar[str]  # in veneer.kernels.fourbit.LEVELS
    keys = {"absmax": "weight.absmax"}

    @classmethod
    def from_weight(cls: type[Self], weight_OI: Tensor, bias_O: Tensor | None = None) -> Self:
        check_weight(cls.storage, weight_OI)
        made = cls(tuple(weight_OI.shape), weight_OI.dtype, bias_O)
        packed, absmax_K = quantise_4bit(weight_OI.detach(), cls.levels)
        made.weight = frozen(packed)
        made._hold(absmax_K)
        return made

    @classmethod
    def empty(
        cls: type[Self],
        out_features: int,
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Self:
        bias_O = unset(out_features, dtype=dtype, device=device) if bias else None
        made = cls((out_features, in_features), dtype, bias_O)
        made.weight = unset(-(-out_features * in_features // 2), 1, dtype=torch.uint8, device=device)
        made._hold_empty(-(-out_features * in_features // BLOCK), device)
        return made

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        shape = (self.out_features, self.in_features)
        return dequantise_4bit(self.weight, self.absmax, shape, dtype or self.dtype, self.levels, self._nested())

    def _hold(self, absmax_K: Tensor) -> None:
        self.absmax = frozen(absmax_K)

    def _hold_empty(self, blocks: int, device: torch.device | str | None) -> None:
        self.absmax = unset(blocks, dtype=torch.float32, device=device)

    def _nested(self) -> Nested | None:
        """What decodes the magnitudes; None where they are float32."""
        return None
