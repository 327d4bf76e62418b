"""Decoding of 4-bit weights on a GPU: one launch, codes and magnitudes read once, the weight written once."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.fourbit import BLOCK, LEVELS
from veneer.kernels.nested import NESTED_BLOCK, Nested

PAIRS_A_PROGRAM = 1024


def dequantise_4bit_triton(
    packed: Tensor,
    absmax_K: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    levels: str,
    nested: Nested | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `veneer.kernels.dequantise.dequantise_4bit`, to the bit; `out`: contiguous memory to write to."""
    out = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    values = _levels(levels, packed.device)
    # Without `nested` the three pointers are never followed; the compiler wants tensors there all the same.
    scales, table, offset = (values, values, values) if nested is None else nested
    pairs = packed.numel()
    _decode[(triton.cdiv(pairs, PAIRS_A_PROGRAM),)](
        packed,
        absmax_K,
        values,
        scales,
        table,
        offset,
        out,
        pairs,
        math.prod(shape),
        NESTED=nested is not None,
        BLOCK_OF=BLOCK,
        NESTED_OF=NESTED_BLOCK,
        PAIRS=PAIRS_A_PROGRAM,
        # A fused multiply-add would round once where the reference rounds twice.
        **({} if packed.device.type == "cpu" else {"enable_fp_fusion": False}),
    )
    return out


@triton.jit
def _decode(
    packed_ptr,
    absmax_ptr,
    levels_ptr,
    nested_absmax_ptr,
    nested_values_ptr,
    offset_ptr,
    out_ptr,
    pairs,
    count,
    NESTED: tl.constexpr,
    BLOCK_OF: tl.constexpr,
    NESTED_OF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    # Offsets of a program are 64 bits wide, those within it 32.
    program = tl.program_id(0)
    first = program.to(tl.int64) * PAIRS
    pair = tl.arange(0, PAIRS)
    inside = pair < pairs - first
    byte = tl.load(packed_ptr + first + pair, mask=inside, other=0).to(tl.int32)
    block = program * (PAIRS // (BLOCK_OF // 2)) + pair // (BLOCK_OF // 2)
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(nested_absmax_ptr + block // NESTED_OF, mask=inside, other=0.0)
        absmax = tl.load(nested_values_ptr + code) * scale + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    high = tl.load(levels_ptr + (byte >> 4)) * absmax
    low = tl.load(levels_ptr + (byte & 15)) * absmax
    # Interleaved, the two halves are one contiguous run; an odd count leaves the last half out.
    values = tl.interleave(high, low)
    element = tl.arange(0, 2 * PAIRS)
    tl.store(out_ptr + 2 * first + element, values.to(out_ptr.dtype.element_ty), mask=element < count - 2 * first)


@lru_cache(maxsize=16)
def _levels(levels: str, device: torch.device) -> Tensor:
    return torch.tensor(LEVELS[levels], device=device)
