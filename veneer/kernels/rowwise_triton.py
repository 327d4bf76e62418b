"""Rows of 8 bits on a GPU: activations to e4m3, weights back to floats, each one launch, one read, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.rowwise import E4M3, E4M3_MAX, LEAST

IN_REGISTERS = 1 << 15  # columns of a row that one program holds; a longer row is read twice


def quantise_rows_fp8_triton(
    x_TI: Tensor, out: tuple[Tensor, Tensor] | None = None, at_once: int = IN_REGISTERS
) -> tuple[Tensor, Tensor]:
    """As `veneer.kernels.rowwise.quantise_rows_fp8_reference`, to the bit.

    out: codes (T, I) and scales (T, 1) to write to. at_once: columns of a row that a program holds.
    """
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    rows, columns = x_TI.shape
    if out is None:
        codes_TI = torch.empty(rows, columns, dtype=E4M3, device=x_TI.device)
        out = codes_TI, torch.empty(rows, 1, dtype=torch.float32, device=x_TI.device)
    width = min(triton.next_power_of_2(max(columns, 1)), at_once)
    if rows:
        _quantise[(rows,)](
            x_TI,
            x_TI.stride(0),
            *out,
            columns,
            TIMES=triton.cdiv(columns, width),
            WIDTH=width,
            LEAST=LEAST,
            MOST=E4M3_MAX,
            num_warps=min(max(width // 512, 1), 16),
        )
    return out


def dequantise_rows_triton(
    codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype, out: Tensor | None = None, at_once: int = 2048
) -> Tensor:
    """As `veneer.kernels.rowwise.dequantise_rows`, to the bit; `out`: contiguous memory to write to."""
    codes_OI = codes_OI.contiguous()
    rows, columns = codes_OI.shape
    out = torch.empty(rows, columns, dtype=dtype, device=codes_OI.device) if out is None else out
    if out.numel():
        width = min(triton.next_power_of_2(columns), at_once)
        _scale[(rows, triton.cdiv(columns, width))](codes_OI, scale_O, out, columns, WIDTH=width)
    return out


@triton.jit
def _scale(codes_ptr, scale_ptr, out_ptr, columns, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = row * columns + column
    code = tl.load(codes_ptr + here, mask=column < columns, other=0.0).to(tl.float32)
    value = code * tl.load(scale_ptr + row)
    tl.store(out_ptr + here, value.to(out_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _quantise(
    x_ptr,
    x_stride,
    codes_ptr,
    scale_ptr,
    columns,
    TIMES: tl.constexpr,
    WIDTH: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    x_ptr += row * x_stride
    x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), 0)
    # A comparison, because the maximum leaves NaN out.
    broken = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), 0)
    for step in range(1, TIMES):
        here = step * WIDTH + column
        more = tl.load(x_ptr + here, mask=here < columns, other=0.0).to(tl.float32)
        absmax = tl.maximum(absmax, tl.max(tl.abs(more), 0))
        broken = tl.maximum(broken, tl.max((~(tl.abs(more) < float("inf"))).to(tl.int32), 0))
    absmax = tl.maximum(absmax, LEAST)
    tl.store(scale_ptr + row, tl.where(broken != 0, float("nan"), absmax * (1 / MOST)))
    inverse = MOST * tl.div_rn(1.0, absmax)  # as torch divides a number by a tensor: it rounds twice
    for step in range(TIMES):
        here = step * WIDTH + column
        if TIMES > 1:
            x = tl.load(x_ptr + here, mask=here < columns, other=0.0).to(tl.float32)
        code = tl.minimum(tl.maximum(x * inverse, -MOST), MOST)
        tl.store(codes_ptr + row * columns + here, code.to(codes_ptr.dtype.element_ty), mask=here < columns)
