"""Weights of 4 bits: blocks of 64 elements, each a largest magnitude times one of 16 levels.

Legend: N elements, P pairs (bytes), K blocks.

Two sets of levels: NF4, the quantiles of a Gaussian (Dettmers et al. 2023, arXiv 2305.14314), and INT4, 15 uniform
ones. Codes, magnitudes and decoded values of NF4 are those of bitsandbytes to the bit: blocks run over the flattened
weight, the first element of a pair is the high nibble, an odd count is padded with a zero, the last block may be
short. `veneer.kernels.dequantise` chooses between the decoding here and its Triton version.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 64
LEVELS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "int4": (*(level / 7 for level in range(-7, 8)), 1.0),  # code 15 is never written
}
# Elements encoded at a time (a multiple of BLOCK): what is held beside input and output is a few times this.
ENCODE_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 25}
# Pairs decoded at a time (a multiple of BLOCK / 2): 2 MiB of float32, the size of a second-level cache. Smaller pieces
# gain little, and threads wait for one another after each step of each piece.
DECODE_AT_ONCE = 1 << 18
CELLS = 64  # of [-1, 1] in the search for a level: narrow enough that none holds two midpoints
TINY = 1e-38  # bitsandbytes' least divisor: an all-zero block encodes to zeros


def quantise_4bit(w: Tensor, levels: str) -> tuple[Tensor, Tensor]:
    """Codes (P, 1) in uint8 and magnitudes (K) in float32 of a float tensor of any shape, on its device."""
    flat_N = w.reshape(-1)
    count, step = flat_N.numel(), ENCODE_AT_ONCE.get(w.device.type, ENCODE_AT_ONCE["cpu"])
    packed_P = torch.empty(-(-count // 2), dtype=torch.uint8, device=w.device)
    absmax_K = torch.empty(-(-count // BLOCK), dtype=torch.float32, device=w.device)
    for start in range(0, count, step):
        piece = flat_N[start : start + step].float()
        codes, absmax = _encoded(piece, levels)
        absmax_K[start // BLOCK : start // BLOCK + len(absmax)] = absmax
        torch.add(codes[0::2] * 16, codes[1::2], out=packed_P[start // 2 : start // 2 + len(codes) // 2])
    return packed_P.unsqueeze(1), absmax_K


def _encoded(piece_N: Tensor, levels: str) -> tuple[Tensor, Tensor]:
    """One code an element, padded to an even count, and magnitudes; only the last block may be short."""
    short = len(piece_N) % BLOCK
    whole, rest = piece_N[: len(piece_N) - short].view(-1, BLOCK), piece_N[len(piece_N) - short :]
    absmax = whole.abs().amax(1) if len(whole) else piece_N.new_empty(0)
    scaled = (whole * absmax.clamp(min=TINY).reciprocal().unsqueeze(1)).view(-1)
    if short:
        # bitsandbytes divides here where it multiplies by the reciprocal above: the last bit may differ.
        last = rest.abs().amax().clamp(min=TINY)
        absmax, scaled = torch.cat([absmax, last.view(1)]), torch.cat([scaled, rest / last])
    codes = _nearest(scaled, levels)
    return (torch.cat([codes, codes.new_tensor([7])]) if len(codes) % 2 else codes), absmax


def _nearest(scaled_N: Tensor, levels: str) -> Tensor:
    """Number of midpoints below each value of [-1, 1]: `torch.bucketize`, ten times faster on CPU.

    The cell of a value says how many midpoints lie below the cell, and which one may lie in it.
    """
    below, inside = _cells(levels, scaled_N.device)
    cell_N = torch.add(CELLS / 2, scaled_N, alpha=CELLS / 2).int().clamp_(0, CELLS)
    above_N = scaled_N > torch.index_select(inside, 0, cell_N)
    return torch.index_select(below, 0, cell_N).add_(above_N)


def dequantise_4bit_reference(
    packed: Tensor, absmax_K: Tensor, shape: tuple[int, ...], dtype: torch.dtype, levels: str
) -> Tensor:
    """The weight from codes and float32 magnitudes, each product rounded once, to `dtype`."""
    packed_P = packed.view(-1)
    whole = len(packed_P) // (BLOCK // 2)  # blocks that are not short
    out = torch.empty(len(packed_P) * 2, dtype=dtype, device=packed.device)
    pairs = _pairs(levels, packed.device)
    step = DECODE_AT_ONCE if packed.device.type == "cpu" else len(packed_P)
    scratch = None if dtype == torch.float32 else out.new_empty(2 * min(step, len(packed_P)), dtype=torch.float32)
    for start in range(0, len(packed_P), step):
        stop = min(start + step, len(packed_P))
        target = out[2 * start : 2 * stop]
        values = target if scratch is None else scratch[: len(target)]
        # One lookup a byte: a pair of float32 levels travels as one element of eight bytes.
        torch.index_select(pairs, 0, packed_P[start:stop].int(), out=values.view(torch.float64))
        blocks = values[: (min(stop, whole * BLOCK // 2) - start) * 2].view(-1, BLOCK)
        first = start * 2 // BLOCK
        blocks.mul_(absmax_K[first : first + len(blocks)].unsqueeze(1))
        values[blocks.numel() :].mul_(absmax_K[-1])
        if scratch is not None:
            target.copy_(values)
    return out[: math.prod(shape)].view(shape)


@lru_cache(maxsize=16)
def _cells(levels: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell: how many midpoints lie below it, and the one inside or infinity."""
    values = torch.tensor(LEVELS[levels])
    midpoints = ((values[:-1] + values[1:]) / 2).tolist()
    edges = [2 * cell / CELLS - 1 for cell in range(CELLS + 2)]
    below = [sum(middle < edge for middle in midpoints) for edge in edges[:-1]]
    inside = [
        next((middle for middle in midpoints if left <= middle < right), math.inf) for left, right in pairwise(edges)
    ]
    return torch.tensor(below, dtype=torch.uint8, device=device), torch.tensor(inside, device=device)


@lru_cache(maxsize=16)
def _pairs(levels: str, device: torch.device) -> Tensor:
    """(256) float64 whose bytes are the two float32 levels of each byte of codes."""
    values, byte = torch.tensor(LEVELS[levels], device=device), torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).view(torch.float64).view(-1)
