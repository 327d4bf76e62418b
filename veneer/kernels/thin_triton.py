"""Both products of a gradient with thin matrices, in one read of it: what LoRA's backward asks of every output.

Legend: T tokens, O out, R rank.

g (T, O) is by far the largest of what takes part, and each product alone would read it from memory. A program owns a
rectangle of g. What it finds of dz = g B is a part of a sum over rectangles beside it, what it finds of dB = g' z one
over those below it; both sums are made by a second launch, always in the same order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_RANK = 16  # of the hardware's product; a smaller rank is padded
ROWS, COLUMNS, STAGES, WARPS = 64, 128, 3, 4  # of g that a program reads at a time
PROGRAMS = 2  # for each multiprocessor of the GPU, at most about


def thin_gradients(g_TO: Tensor, z_TR: Tensor, b_OR: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g B, (T, R) in g's dtype, and g' z, (O, R) in `dtype`; sums run in float32."""
    tokens, out = g_TO.shape
    rank = b_OR.shape[1]
    across, down = triton.cdiv(out, COLUMNS), triton.cdiv(tokens, ROWS)
    steps = coarse(triton.cdiv(down, max(1, PROGRAMS * multiprocessors(g_TO.device) // across)))
    deep = triton.cdiv(down, steps)
    dz_parts = torch.empty(across, tokens, rank, dtype=torch.float32, device=g_TO.device)
    db_parts = torch.empty(deep, out, rank, dtype=torch.float32, device=g_TO.device)
    sizes = {"RANK": rank, "PADDED": max(LEAST_RANK, triton.next_power_of_2(rank)), "STEPS": steps}
    _rectangle[(across, deep)](
        *(g_TO, g_TO.stride(0), z_TR, z_TR.stride(0), b_OR, dz_parts, db_parts, tokens, out),
        **(sizes | {"ROWS": ROWS, "COLUMNS": COLUMNS}),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return dz_parts.sum(0).to(g_TO.dtype), db_parts.sum(0).to(dtype)


def coarse(count: int) -> int:
    """The next power of two or three quarters of it: the kernel is compiled anew for every number of steps."""
    power = triton.next_power_of_2(count)
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _rectangle(
    g_ptr,
    g_stride,
    z_ptr,
    z_stride,
    b_ptr,
    dz_ptr,
    db_ptr,
    tokens,
    out,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, PADDED)
    b_here = (column[:, None] < out) & (rank[None, :] < RANK)
    b = tl.load(b_ptr + column[:, None] * RANK + rank[None, :], mask=b_here, other=0.0)
    db = tl.zeros([COLUMNS, PADDED], tl.float32)
    dz_ptr += tl.program_id(0).to(tl.int64) * tokens * RANK
    for step in range(STEPS):
        row = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        g_here = (row[:, None] < tokens) & (column[None, :] < out)
        g = tl.load(g_ptr + row[:, None].to(tl.int64) * g_stride + column[None, :], mask=g_here, other=0.0)
        z_here = (row[:, None] < tokens) & (rank[None, :] < RANK)
        z = tl.load(z_ptr + row[:, None] * z_stride + rank[None, :], mask=z_here, other=0.0)
        tl.store(dz_ptr + row[:, None] * RANK + rank[None, :], tl.dot(g, b), mask=z_here)
        db += tl.dot(tl.trans(g), z)
    db_ptr += tl.program_id(1).to(tl.int64) * out * RANK
    tl.store(db_ptr + column[:, None] * RANK + rank[None, :], db, mask=b_here)
