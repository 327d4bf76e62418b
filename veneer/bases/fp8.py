"""8-bit floats (e4m3) with one scale a row, multiplied as such where the hardware can.

Legend: T tokens, I in, O out.

The product of both sides in e4m3 needs a CUDA GPU of compute capability 8.9 (Ada) or later, and O and I that are
multiples of 16; activations are then quantised row by row as they come. Elsewhere W is decoded. The backward product
needs W with its rows along O, which the hardware does not transpose by itself: `add_transposed` keeps a second copy,
without which it decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from veneer.bases.base import check_weight, frozen
from veneer.bases.quantised import Quantised, unset
from veneer.kernels.rowwise import E4M3, dequantise_rows, quantise_rows_fp8, quantise_rows_fp8_reference

LEAST_CAPABILITY = (8, 9)
MULTIPLE = 16  # of O and I, which the hardware's product asks for


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def fp8_supported(device: torch.device | str) -> bool:
    """Whether this device multiplies e4m3 matrices."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return False
    return _capability(device) >= LEAST_CAPABILITY


class FP8(Quantised):
    """Codes (O, I) in e4m3, scales (O) in float32: w = code · scale; 3 bits of mantissa, error up to 2⁻⁴ of w."""

    storage = "fp8"
    keys = {"scale": "weight.scale"}
    unsaved = ("weight_t", "scale_t")
    weight_t: nn.Parameter | None  # (I, O) in e4m3, see add_transposed
    scale_t: nn.Parameter | None  # (I) in float32

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__(shape, dtype, bias)
        self.register_parameter("weight_t", None)
        self.register_parameter("scale_t", None)

    @classmethod
    def from_weight(cls, weight_OI: Tensor, bias_O: Tensor | None = None) -> FP8:
        check_weight(cls.storage, weight_OI)
        made = cls(tuple(weight_OI.shape), weight_OI.dtype, bias_O)
        codes_OI, scale_O1 = quantise_rows_fp8_reference(weight_OI.detach())
        made.weight, made.scale = frozen(codes_OI), frozen(scale_O1.view(-1))
        return made

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> FP8:
        bias_O = unset(out_features, dtype=dtype, device=device) if bias else None
        made = cls((out_features, in_features), dtype, bias_O)
        made.weight = unset(out_features, in_features, dtype=E4M3, device=device)
        made.scale = unset(out_features, dtype=torch.float32, device=device)
        return made

    def add_transposed(self, weight_OI: Tensor | None = None) -> None:
        """Keeps a second copy, W' with a scale a column of W, for the backward product; another byte an element.

        weight_OI: the weight as it was before it was stored; without it W as stored is rounded a second time.
        `state_dict` leaves the copy out, and loading drops it: call this again.
        """
        w_OI = self.decode() if weight_OI is None else weight_OI.detach()
        codes_IO, scale_I1 = quantise_rows_fp8_reference(w_OI.t())
        self.weight_t, self.scale_t = frozen(codes_IO), frozen(scale_I1.view(-1))

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        return dequantise_rows(self.weight, self.scale, dtype or self.dtype)

    @property
    def adds(self) -> bool:
        return not fp8_supported(self.device)  # the hardware's product is written, never added

    def matmul(self, x_TI: Tensor, into: Tensor | None = None) -> Tensor:
        if not self._in_fp8(x_TI):
            return super().matmul(x_TI, into)
        return _product(quantise_rows_fp8(x_TI), self.weight, self.scale, x_TI.dtype, into)

    @classmethod
    def matmuls(cls, bases: Sequence[FP8], x_TI: Tensor, intos: Sequence[Tensor | None]) -> list[Tensor]:
        """As the contract; x is quantised once for all."""
        if not all(base._in_fp8(x_TI) for base in bases):
            return super().matmuls(bases, x_TI, intos)
        x8, dtype = quantise_rows_fp8(x_TI), x_TI.dtype
        return [_product(x8, base.weight, base.scale, dtype, into) for base, into in zip(bases, intos, strict=True)]

    def matmul_t(self, g_TO: Tensor, into: Tensor | None = None) -> Tensor:
        if self.weight_t is None or not self._in_fp8(g_TO):
            return super().matmul_t(g_TO, into)
        return _product(quantise_rows_fp8(g_TO), self.weight_t, self.scale_t, g_TO.dtype, into)

    def _in_fp8(self, x: Tensor) -> bool:
        fits = len(x) > 0 and self.in_features % MULTIPLE == 0 and self.out_features % MULTIPLE == 0
        return fits and fp8_supported(x.device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if prefix + "weight" in state_dict:
            self.weight_t = self.scale_t = None  # of the weight that was
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _product(
    x: tuple[Tensor, Tensor], codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype, into: Tensor | None
) -> Tensor:
    """x W' with both sides in e4m3, (T, O) in `dtype`; the hardware accumulates and rounds to bfloat16.

    x: codes (T, I) and scales (T, 1).
    """
    y_TO = torch._scaled_mm(
        x[0],
        codes_OI.t(),
        x[1],
        scale_O.unsqueeze(0),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y_TO.to(dtype) if into is None else into.add_(y_TO)
