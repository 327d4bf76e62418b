"""Magnitudes of blocks in 8 bits: the double quantisation of QLoRA (arXiv 2305.14314, section 3).

Legend: K blocks of the weight, M blocks of 256 of those.

The mean over the whole tensor is taken off, the rest is coded with the dynamic map (Dettmers 2015, arXiv 1511.04561):
a sign, a decimal exponent in unary, and the bits left over as a linear fraction.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

NESTED_BLOCK = 256
TINY = 1e-38  # least divisor: a block of zeros encodes to zeros


class Nested(NamedTuple):
    """What 8-bit codes need to be magnitudes: values[code] · absmax[block] + offset, rounded after each step."""

    absmax: Tensor  # (M) float32
    values: Tensor  # (256) float32, ascending
    offset: Tensor  # (1) float32


def quantise_absmax(absmax_K: Tensor) -> tuple[Tensor, Nested]:
    """Codes (K) in uint8, each the nearest there is, and what decodes them."""
    offset = absmax_K.mean()
    padded = torch.nn.functional.pad(absmax_K - offset, (0, -len(absmax_K) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax_M = padded.abs().amax(1)
    values = dynamic_map().to(absmax_K.device)
    scaled = padded * absmax_M.clamp(min=TINY).reciprocal().unsqueeze(1)
    codes = torch.bucketize(scaled.view(-1)[: len(absmax_K)], (values[:-1] + values[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8), Nested(absmax_M, values, offset.view(1))


def dequantise_absmax(codes_K: Tensor, nested: Nested) -> Tensor:
    """Magnitudes (K) in float32."""
    scale_K = nested.absmax.repeat_interleave(NESTED_BLOCK)[: len(codes_K)]
    return torch.index_select(nested.values, 0, codes_K.int()).mul_(scale_K).add_(nested.offset)


@lru_cache(maxsize=1)
def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic map, ascending, on the CPU; not to be written to."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [means, -means]
    return torch.cat(values).sort().values
