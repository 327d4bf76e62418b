"""4-bit NormalFloat (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), bit-compatible with bitsandbytes.

Legend: I in, O out, K = ⌈OI/64⌉ blocks, M = ⌈K/256⌉ blocks of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.bases import bitsandbytes4
from veneer.bases.base import frozen
from veneer.bases.fourbit import FourBit
from veneer.bases.quantised import unset
from veneer.kernels.nested import NESTED_BLOCK, Nested, quantise_absmax


class NF4(FourBit):
    """4.5 bits an element: magnitudes (K) in float32."""

    storage = "nf4"
    levels = "nf4"

    def extra_state(self) -> dict[str, Tensor]:
        return bitsandbytes4.extra_state(self, self._nested())

    def faults_of(self, state: dict[str, Tensor]) -> list[str]:
        return bitsandbytes4.faults_of(state, self, nested=False)


class NF4Double(NF4):
    """4.127 bits an element: magnitudes as codes (K) in uint8, with nested magnitudes (M), a map (256), a mean (1)."""

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
