"""Decoding of 4-bit weights: the torch reference on the CPU, Triton on CUDA, one operation for a compiled graph."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.fourbit import dequantise_4bit_reference
from veneer.kernels.nested import Nested, dequantise_absmax
from veneer.kernels.triton_here import has_triton


def dequantise_4bit(
    packed: Tensor,
    absmax_K: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    levels: str,
    nested: Nested | None = None,
) -> Tensor:
    """The weight (O, I) in `dtype` from codes (⌈OI/2⌉, 1) in uint8 and magnitudes of blocks of 64.

    levels: "nf4" or "int4". Without `nested` the magnitudes are float32; with it they are 8-bit codes.
    The float32 product of level and magnitude is rounded once.
    """
    parts = (None, None, None) if nested is None else tuple(nested)
    # A compiled graph holds one opaque operation; an ordinary call on the CPU is spared the cost of dispatching one.
    decode = _decoded if packed.device.type == "cpu" and not torch.compiler.is_compiling() else _decode_op
    return decode(packed, absmax_K, *shape, dtype, levels, *parts)


def dequantise_nf4(
    packed: Tensor, absmax_K: Tensor, shape: tuple[int, int], dtype: torch.dtype, nested: Nested | None = None
) -> Tensor:
    """`dequantise_4bit` with the levels of NF4."""
    return dequantise_4bit(packed, absmax_K, shape, dtype, "nf4", nested)


def _decoded(
    packed: Tensor,
    absmax_K: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    levels: str,
    nested_absmax: Tensor | None,
    nested_values: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    nested = None if nested_absmax is None else Nested(nested_absmax, nested_values, offset)
    if packed.is_cuda and has_triton():
        from veneer.kernels.fourbit_triton import dequantise_4bit_triton

        return dequantise_4bit_triton(packed, absmax_K, (rows, columns), dtype, levels, nested)
    absmax_K = absmax_K if nested is None else dequantise_absmax(absmax_K, nested)
    return dequantise_4bit_reference(packed, absmax_K, (rows, columns), dtype, levels)


_decode_op = torch.library.custom_op(
    "veneer::dequantise_4bit",
    _decoded,
    mutates_args=(),
    schema="(Tensor packed, Tensor absmax, int rows, int columns, ScalarType dtype, str levels, "
    "Tensor? nested_absmax, Tensor? nested_values, Tensor? offset) -> Tensor",
)


@_decode_op.register_fake
def _shape_of_decoded(
    packed: Tensor, absmax_K: Tensor, rows: int, columns: int, dtype: torch.dtype, *_rest: object
) -> Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)
