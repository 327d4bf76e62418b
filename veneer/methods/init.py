"""Starting values of the factors, one function each; the table INITS.

Legend: I in, O out, R rank. All start as the base: B = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Start = Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]


def kaiming(w_OI: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A ~ U(-1/√I, 1/√I), B = 0: the reference code of 2106.09685 (kaiming_uniform with a = √5)."""
    out_features, in_features = w_OI.shape
    a_RI = torch.empty(rank, in_features).uniform_(-1.0, 1.0, generator=generator) / math.sqrt(in_features)
    return a_RI, torch.zeros(out_features, rank)


def gaussian(w_OI: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1/r²), B = 0: the paper's words, with the deviation that PEFT takes."""
    out_features, in_features = w_OI.shape
    return torch.randn(rank, in_features, generator=generator) / rank, torch.zeros(out_features, rank)


# name -> (weight (O, I), rank, generator) -> a (R, I), b (O, R), float32 on the CPU
INITS: dict[str, Start] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
}
