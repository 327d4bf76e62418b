"""SwiGLU with LoRA around it, each of its large tensors read and written once.

Legend: T tokens, F width of the MLP, R rank.

Written as products, the adapters of gate, up and down pass over F-wide tensors eighteen times a step beside the frozen
products; here it is eight. A program owns a rectangle (rows of T, columns of F). Sums over columns (z, dz) and over
rows (gradients of factors) are found in parts, which a second launch adds, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.swiglu import SwigluGradients
from veneer.kernels.thin_triton import LEAST_RANK, coarse, multiprocessors

ROWS, COLUMNS, STAGES, WARPS = 32, 128, 2, 4  # that a program reads at a time
PROGRAMS = 4  # for each multiprocessor of the GPU, at most about so many


def swiglu(
    g_TF: Tensor,
    u_TF: Tensor,
    zs: tuple[Tensor, Tensor],
    bs: tuple[Tensor, Tensor],
    a_RF: Tensor,
) -> tuple[Tensor, Tensor]:
    """h = silu(g + z_g B_g') · (u + z_u B_u'), (T, F), and h A', (T, R) in float32."""
    grid, sizes = _grid(g_TF)
    h_TF = torch.empty(g_TF.shape, dtype=g_TF.dtype, device=g_TF.device)
    z_parts = torch.empty(grid[0], len(g_TF), len(a_RF), dtype=torch.float32, device=g_TF.device)
    _swiglu[grid](
        *(g_TF, g_TF.stride(0), u_TF, u_TF.stride(0)),
        *(zs[0], zs[0].stride(0), zs[1], zs[1].stride(0), *bs, a_RF, h_TF, z_parts, *g_TF.shape),
        **(sizes | _ranks(bs, a_RF)),
    )
    return h_TF, z_parts.sum(0)


def swiglu_backward(
    dh_TF: Tensor,
    g_TF: Tensor,
    u_TF: Tensor,
    zs: tuple[Tensor, Tensor],
    dz_TR: Tensor,
    bs: tuple[Tensor, Tensor],
    a_RF: Tensor,
) -> SwigluGradients:
    """Of dh, to which dz A is added here; dg comes in its memory."""
    grid, sizes = _grid(g_TF)
    across, deep = grid

    def parts(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=g_TF.device)

    (tokens, width), ranks = g_TF.shape, _ranks(bs, a_RF)
    du_TF = torch.empty(g_TF.shape, dtype=g_TF.dtype, device=g_TF.device)
    dzs = [parts(across, tokens, b.shape[1]) for b in bs]
    dbs = [parts(deep, width, b.shape[1]) for b in bs]
    da, z = parts(deep, width, len(a_RF)), parts(across, tokens, len(a_RF))
    _swiglu_backward[grid](
        *(dh_TF, dh_TF.stride(0), g_TF, g_TF.stride(0), u_TF, u_TF.stride(0)),
        *(zs[0], zs[0].stride(0), zs[1], zs[1].stride(0), dz_TR, dz_TR.stride(0), *bs, a_RF),
        *(du_TF, *dzs, *dbs, da, z, tokens, width),
        **(sizes | ranks),
    )
    dz_g, dz_u = (part.sum(0) for part in dzs)
    db_g, db_u = (part.sum(0) for part in dbs)
    return SwigluGradients((dh_TF, du_TF), (dz_g, dz_u), (db_g, db_u), da.sum(0).t(), z.sum(0))


def _grid(g_TF: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    across, down = triton.cdiv(g_TF.shape[1], COLUMNS), triton.cdiv(len(g_TF), ROWS)
    programs = PROGRAMS * multiprocessors(g_TF.device)
    steps = coarse(triton.cdiv(down, max(1, programs // across)))
    sizes = {"STEPS": steps, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS, "num_stages": STAGES}
    return (across, triton.cdiv(down, steps)), sizes


def _ranks(bs: tuple[Tensor, Tensor], a_RF: Tensor) -> dict[str, int]:
    ranks = {"GATE": bs[0].shape[1], "UP": bs[1].shape[1], "DOWN": len(a_RF)}
    padded = {f"{name}_PAD": max(LEAST_RANK, triton.next_power_of_2(rank)) for name, rank in ranks.items()}
    return ranks | padded


@triton.jit
def _tall(ptr, stride, row, size, RANK: tl.constexpr, PAD: tl.constexpr):
    """Rows of a (size, RANK) matrix, padded with zeros: (rows, PAD)."""
    rank = tl.arange(0, PAD)
    here = (row[:, None] < size) & (rank[None, :] < RANK)
    return tl.load(ptr + row[:, None].to(tl.int64) * stride + rank[None, :], mask=here, other=0.0)


@triton.jit
def _wide(ptr, column, size, RANK: tl.constexpr, PAD: tl.constexpr):
    """Columns of a (RANK, size) matrix, transposed and padded with zeros: (columns, PAD)."""
    rank = tl.arange(0, PAD)
    here = (column[:, None] < size) & (rank[None, :] < RANK)
    return tl.load(ptr + rank[None, :] * size + column[:, None], mask=here, other=0.0)


@triton.jit
def _keep(ptr, part, place, size, value, RANK: tl.constexpr, PAD: tl.constexpr):
    """Writes (places, PAD) to part number `part` of (parts, size, RANK)."""
    rank = tl.arange(0, PAD)
    here = (place[:, None] < size) & (rank[None, :] < RANK)
    ptr += part.to(tl.int64) * size * RANK
    tl.store(ptr + place[:, None] * RANK + rank[None, :], value, mask=here)


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
    a_ptr,
    h_ptr,
    z_ptr,
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
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    bg = _tall(bg_ptr, GATE, column, width, GATE, GATE_PAD)
    bu = _tall(bu_ptr, UP, column, width, UP, UP_PAD)
    a = _wide(a_ptr, column, width, DOWN, DOWN_PAD)
    for step in range(STEPS):
        row = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        here = (row[:, None] < tokens) & (column[None, :] < width)
        large = row[:, None].to(tl.int64)
        g = tl.load(g_ptr + large * g_stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + large * u_stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        g += tl.dot(_tall(zg_ptr, zg_stride, row, tokens, GATE, GATE_PAD), tl.trans(bg))
        u += tl.dot(_tall(zu_ptr, zu_stride, row, tokens, UP, UP_PAD), tl.trans(bu))
        h = (g * tl.sigmoid(g) * u).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + large * width + column[None, :], h, mask=here)
        _keep(z_ptr, tl.program_id(0), row, tokens, tl.dot(h, a), DOWN, DOWN_PAD)


@triton.jit
def _swiglu_backward(
    dh_ptr,
    dh_stride,
    g_ptr,
    g_stride,
    u_ptr,
    u_stride,
    zg_ptr,
    zg_stride,
    zu_ptr,
    zu_stride,
    dz_ptr,
    dz_stride,
    bg_ptr,
    bu_ptr,
    a_ptr,
    du_ptr,
    dzg_ptr,
    dzu_ptr,
    dbg_ptr,
    dbu_ptr,
    da_ptr,
    z_ptr,
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
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    bg = _tall(bg_ptr, GATE, column, width, GATE, GATE_PAD)
    bu = _tall(bu_ptr, UP, column, width, UP, UP_PAD)
    a = _wide(a_ptr, column, width, DOWN, DOWN_PAD)
    dbg = tl.zeros([COLUMNS, GATE_PAD], tl.float32)
    dbu = tl.zeros([COLUMNS, UP_PAD], tl.float32)
    da = tl.zeros([COLUMNS, DOWN_PAD], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        here = (row[:, None] < tokens) & (column[None, :] < width)
        large = row[:, None].to(tl.int64)
        g = tl.load(g_ptr + large * g_stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + large * u_stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + large * dh_stride + column[None, :], mask=here, other=0.0).to(tl.float32)
        zg = _tall(zg_ptr, zg_stride, row, tokens, GATE, GATE_PAD)
        zu = _tall(zu_ptr, zu_stride, row, tokens, UP, UP_PAD)
        dz = _tall(dz_ptr, dz_stride, row, tokens, DOWN, DOWN_PAD)
        g += tl.dot(zg, tl.trans(bg))
        u += tl.dot(zu, tl.trans(bu))
        dh += tl.dot(dz, tl.trans(a))
        s = tl.sigmoid(g)
        h = (g * s * u).to(du_ptr.dtype.element_ty)
        du = (dh * g * s).to(du_ptr.dtype.element_ty)
        dg = (dh * u * s * (1 + g * (1 - s))).to(du_ptr.dtype.element_ty)
        tl.store(dh_ptr + large * dh_stride + column[None, :], dg, mask=here)
        tl.store(du_ptr + large * width + column[None, :], du, mask=here)
        _keep(dzg_ptr, tl.program_id(0), row, tokens, tl.dot(dg, bg), GATE, GATE_PAD)
        _keep(dzu_ptr, tl.program_id(0), row, tokens, tl.dot(du, bu), UP, UP_PAD)
        _keep(z_ptr, tl.program_id(0), row, tokens, tl.dot(h, a), DOWN, DOWN_PAD)
        dbg += tl.dot(tl.trans(dg), zg)
        dbu += tl.dot(tl.trans(du), zu)
        da += tl.dot(tl.trans(h), dz)
    _keep(dbg_ptr, tl.program_id(1), column, width, dbg, GATE, GATE_PAD)
    _keep(dbu_ptr, tl.program_id(1), column, width, dbu, UP, UP_PAD)
    _keep(da_ptr, tl.program_id(1), column, width, da, DOWN, DOWN_PAD)
