"""4-bit NormalFloat (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), bit-compatible with bitsandbytes.

Legend: I in, O out, P = ⌈OI/2⌉ bytes of two codes, K = ⌈OI/64⌉ blocks, M = ⌈K/256⌉ blocks of blocks.

4.5 bits an element with float32 magnitudes, 4.127 with double quantisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.bases import bitsandbytes4
from veneer.bases.base import check_weight, frozen
from veneer.bases.quantised import Quantised, unset
from veneer.kernels.dequantise import dequantise_nf4
from veneer.kernels.fourbit import BLOCK, quantise_4bit
from veneer.kernels.nested import NESTED_BLOCK, Nested, quantise_absmax


class NF4(Quantised):
    """Codes (P, 1) in uint8 over the flattened weight, magnitudes (K) in float32."""

    storage = "nf4"
    keys = {"absmax": "weight.absmax"}

    @classmethod
    def from_weight(cls, weight_OI: Tensor, bias_O: Tensor | None = None) -> NF4:
        check_weight(cls.storage, weight_OI)
        made = cls(tuple(weight_OI.shape), weight_OI.dtype, bias_O)
        packed, absmax_K = quantise_4bit(weight_OI.detach(), "nf4")
        made.weight = frozen(packed)
        made._hold(absmax_K)
        return made

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> NF4:
        bias_O = unset(out_features, dtype=dtype, device=device) if bias else None
        made = cls((out_features, in_features), dtype, bias_O)
        made.weight = unset(-(-out_features * in_features // 2), 1, dtype=torch.uint8, device=device)
        made._hold_empty(-(-out_features * in_features // BLOCK), device)
        return made

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        shape = (self.out_features, self.in_features)
        return dequantise_nf4(self.weight, self.absmax, shape, dtype or self.dtype, self._nested())

    def extra_state(self) -> dict[str, Tensor]:
        return bitsandbytes4.extra_state(self, self._nested())

    def faults_of(self, state: dict[str, Tensor]) -> list[str]:
        return bitsandbytes4.faults_of(state, self, nested=False)

    def _hold(self, absmax_K: Tensor) -> None:
        self.absmax = frozen(absmax_K)

    def _hold_empty(self, blocks: int, device: torch.device | str | None) -> None:
        self.absmax = unset(blocks, dtype=torch.float32, device=device)

    def _nested(self) -> Nested | None:
        return None


class NF4Double(NF4):
    """NF4 with its magnitudes in 8 bits: codes (K) in uint8, nested magnitudes (M), map (256), mean (1)."""

    storage = "nf4-dq"
    keys = {
        "absmax": "weight.absmax",
        "nested_absmax": "weight.nested_absmax",
        "nested_quant_map": "weight.nested_quant_map",
        "nested_offset": bitsandbytes4.OFFSET,
    }

    def faults_of(self, state: dict[str, Tensor]) -> list[str]:
        return bitsandbytes4.faults_of(state, self, nested=True)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + bitsandbytes4.OFFSET]  # it is in the JSON

    def _hold(self, absmax_K: Tensor) -> None:
        codes_K, nested = quantise_absmax(absmax_K)
        self.absmax = frozen(codes_K)
        self.nested_absmax, self.nested_quant_map = frozen(nested.absmax), frozen(nested.values.clone())
        self.nested_offset = frozen(nested.offset)

    def _hold_empty(self, blocks: int, device: torch.device | str | None) -> None:
        self.absmax = unset(blocks, dtype=torch.uint8, device=device)
        self.nested_absmax = unset(-(-blocks // NESTED_BLOCK), dtype=torch.float32, device=device)
        self.nested_quant_map = unset(256, dtype=torch.float32, device=device)
        self.nested_offset = unset(1, dtype=torch.float32, device=device)

    def _nested(self) -> Nested:
        return Nested(self.nested_absmax, self.nested_quant_map, self.nested_offset)
