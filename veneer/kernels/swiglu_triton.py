"""SwiGLU between layers with LoRA: their thin products are added on the way, where each would be a pass of its own.

Legend: T tokens, F width of the MLP, R rank.

A program owns some columns of F, whose factors stay in registers, and goes down some rows of T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.thin_triton import LEAST_RANK, coarse, multiprocessors

ROWS, COLUMNS, STAGES, WARPS = 32, 128, 3, 4  # that a program reads at a time; 1.1 times a copy's time on an H200
PROGRAMS = 12  # for each multiprocessor of the GPU, about
Pair = tuple[Tensor, Tensor]


def swiglu(g_TF: Tensor, u_TF: Tensor, zs: Pair, bs: Pair) -> Tensor:
    """h = silu(g + z_g B_g') · (u + z_u B_u'), (T, F)."""
    h_TF = torch.empty(g_TF.shape, dtype=g_TF.dtype, device=g_TF.device)
    grid, sizes = _sizes(g_TF, bs)
    _swiglu[grid](*_given(g_TF, u_TF, zs, bs), h_TF, *g_TF.shape, **sizes)
    return h_TF


def swiglu_backward(
    dh_TF: Tensor, g_TF: Tensor, u_TF: Tensor, zs: Pair, dz_TR: Tensor, bs: Pair, a_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dg, du and h of dh + dz A, the gradient of h; dg comes in dh's memory."""
    du_TF, h_TF = (torch.empty(g_TF.shape, dtype=g_TF.dtype, device=g_TF.device) for _ in range(2))
    grid, sizes = _sizes(g_TF, bs)
    ranks = {"DOWN": len(a_RF), "DOWN_PAD": _padded(len(a_RF))}
    _swiglu_backward[grid](
        *(*_given(g_TF, u_TF, zs, bs), dz_TR, dz_TR.stride(0), a_RF.contiguous()),
        *(dh_TF, dh_TF.stride(0), du_TF, h_TF, *g_TF.shape),
        **(sizes | ranks),
    )
    return dh_TF, du_TF, h_TF


def _given(g_TF: Tensor, u_TF: Tensor, zs: Pair, bs: Pair) -> list[Tensor | int]:
    return [part for tensor in (g_TF, u_TF, *zs) for part in (tensor, tensor.stride(0))] + [b.contiguous() for b in bs]


def _sizes(g_TF: Tensor, bs: Pair) -> tuple[tuple[int, int], dict[str, int]]:
    across, down = triton.cdiv(g_TF.shape[1], COLUMNS), triton.cdiv(len(g_TF), ROWS)
    steps = coarse(triton.cdiv(down, max(1, PROGRAMS * multiprocessors(g_TF.device) // across)))
    tile = {"STEPS": steps, "ROWS": ROWS, "COLUMNS": COLUMNS, "STAGES": STAGES, "num_warps": WARPS}
    ranks = {"GATE": bs[0].shape[1], "UP": bs[1].shape[1]}
    ranks |= {f"{name}_PAD": _padded(rank) for name, rank in ranks.items()}
    return (across, triton.cdiv(down, steps)), tile | ranks


def _padded(rank: int) -> int:
    return max(LEAST_RANK, triton.next_power_of_2(rank))


@triton.jit
def _tall(ptr, stride, row, rows, RANK: tl.constexpr, PAD: tl.constexpr):
    """Rows of a matrix RANK wide, padded with zeros: (rows, PAD)."""
    rank = tl.arange(0, PAD)
    here = (row[:, None] < rows) & (rank[None, :] < RANK)
    return tl.load(ptr + row[:, None] * stride + rank[None, :], mask=here, other=0.0)


@triton.jit
def _load(ptr, stride, row, column, here):
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=here, other=0.0).to(tl.float32)


@triton.jit
def _factor(ptr, left, column, columns, RANK: tl.constexpr, PAD: tl.constexpr):
    """B' of a program's columns: (PAD, columns)."""
    return tl.trans(_tall(ptr + left * RANK, RANK, column, columns, RANK, PAD))


@triton.jit
def _adapted(
    y_ptr, y_stride, z_ptr, z_stride, b, top, left, row, rows, column, here, RANK: tl.constexpr, PAD: tl.constexpr
):
    """y + z B' in float32, from row `top` and column `left`."""
    y = _load(y_ptr + top * y_stride + left, y_stride, row, column, here)
    return tl.dot(_tall(z_ptr + top * z_stride, z_stride, row, rows, RANK, PAD), b, y)


@triton.jit
def _store(ptr, stride, row, column, here, value):
    tl.store(ptr + row[:, None] * stride + column[None, :], value.to(ptr.dtype.element_ty), mask=here)


@triton.jit
def _swiglu(
    g_ptr,
    g_stride,
    u_ptr,
    u_stride,
    zg_ptr,
    zg_stride,
    zu_ptr,
    zu_stride,
    bg_ptr,
    bu_ptr,
    h_ptr,
    tokens,
    width,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    GATE_PAD: tl.constexpr,
    UP_PAD: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    left = tl.program_id(0) * COLUMNS
    column, row, columns = tl.arange(0, COLUMNS), tl.arange(0, ROWS), width - left
    bg = _factor(bg_ptr, left, column, columns, GATE, GATE_PAD)
    bu = _factor(bu_ptr, left, column, columns, UP, UP_PAD)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        first = (tl.program_id(1) * STEPS + step) * ROWS
        top, rows = first.to(tl.int64), tokens - first
        here = (row[:, None] < rows) & (column[None, :] < columns)
        g = _adapted(g_ptr, g_stride, zg_ptr, zg_stride, bg, top, left, row, rows, column, here, GATE, GATE_PAD)
        u = _adapted(u_ptr, u_stride, zu_ptr, zu_stride, bu, top, left, row, rows, column, here, UP, UP_PAD)
        _store(h_ptr + top * width + left, width, row, column, here, g * tl.sigmoid(g) * u)


@triton.jit
def _swiglu_backward(
    g_ptr,
    g_stride,
    u_ptr,
    u_stride,
    zg_ptr,
    zg_stride,
    zu_ptr,
    zu_stride,
    bg_ptr,
    bu_ptr,
    dz_ptr,
    dz_stride,
    a_ptr,
    dh_ptr,
    dh_stride,
    du_ptr,
    h_ptr,
    tokens,
    width,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    GATE_PAD: tl.constexpr,
    UP_PAD: tl.constexpr,
    DOWN_PAD: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    left = tl.program_id(0) * COLUMNS
    column, row, columns = tl.arange(0, COLUMNS), tl.arange(0, ROWS), width - left
    bg = _factor(bg_ptr, left, column, columns, GATE, GATE_PAD)
    bu = _factor(bu_ptr, left, column, columns, UP, UP_PAD)
    rank = tl.arange(0, DOWN_PAD)
    a_here = (rank[:, None] < DOWN) & (column[None, :] < columns)
    a = tl.load(a_ptr + left + rank[:, None] * width + column[None, :], mask=a_here, other=0.0)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        first = (tl.program_id(1) * STEPS + step) * ROWS
        top, rows = first.to(tl.int64), tokens - first
        here = (row[:, None] < rows) & (column[None, :] < columns)
        g = _adapted(g_ptr, g_stride, zg_ptr, zg_stride, bg, top, left, row, rows, column, here, GATE, GATE_PAD)
        u = _adapted(u_ptr, u_stride, zu_ptr, zu_stride, bu, top, left, row, rows, column, here, UP, UP_PAD)
        dh = _adapted(dh_ptr, dh_stride, dz_ptr, dz_stride, a, top, left, row, rows, column, here, DOWN, DOWN_PAD)
        s = tl.sigmoid(g)
        _store(h_ptr + top * width + left, width, row, column, here, g * s * u)
        _store(du_ptr + top * width + left, width, row, column, here, dh * g * s)
        _store(dh_ptr + top * dh_stride + left, dh_stride, row, column, here, dh * u * s * (1 + g * (1 - s)))
