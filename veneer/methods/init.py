"""Starting values of the factors, one function each; the table INITS.

Legend: I in, O out, R rank.

A start with B = 0 is the base. One that is not zero is anchored: what is learned is the difference to it
(`veneer.methods.anchored`), so that this, too, starts as the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Start:
    """How factors start.

    factors: (weight (O, I), rank, scale s, generator) -> a (R, I), b (O, R), float32, on the CPU where they are random,
    on the weight's device otherwise. anchored: b is not zero, so the start is taken off again; only such a start looks
    at the weight's values.
    """

    factors: Callable[[Tensor, int, float, torch.Generator], tuple[Tensor, Tensor]]
    anchored: bool = False


def kaiming(w_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A ~ U(-1/√I, 1/√I), B = 0: the reference code of 2106.09685 (kaiming_uniform with a = √5)."""
    out_features, in_features = w_OI.shape
    a_RI = torch.empty(rank, in_features).uniform_(-1.0, 1.0, generator=generator) / math.sqrt(in_features)
    return a_RI, torch.zeros(out_features, rank)


def gaussian(w_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1/r²), B = 0: the paper's words, with the deviation that PEFT takes."""
    out_features, in_features = w_OI.shape
    return torch.randn(rank, in_features, generator=generator) / rank, torch.zeros(out_features, rank)


def lookup(w_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A = 0, B ~ N(0, 1), of an embedding, as in PEFT: its input is one-hot, so that a small random A would keep all
    that B learns small."""
    out_features, in_features = w_OI.shape
    return torch.zeros(rank, in_features), torch.randn(out_features, rank, generator=generator)


def pissa(
    w_OI: Tensor, rank: int, scale: float, generator: torch.Generator, rounds: int | None = None
) -> tuple[Tensor, Tensor]:
    """PiSSA (Meng et al. 2024, arXiv 2404.02948): s B A is the best approximation of W at that rank.

    rounds: of subspace iteration, for a randomised SVD in seconds where the exact one takes minutes.
    """
    u, s, vt = _svd(w_OI, rank, generator, rounds)
    root_R = (s[:rank] / scale).sqrt()
    return root_R[:, None] * vt[:rank], u[:, :rank] * root_R


def milora(w_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """MiLoRA (Wang et al. 2024, arXiv 2406.09044): s B A is of W what its smallest singular values make."""
    u, s, vt = _svd(w_OI, rank, generator, None)
    root_R = (s[-rank:] / scale).sqrt()
    return root_R[:, None] * vt[-rank:], u[:, -rank:] * root_R


def olora(w_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """OLoRA (Büyükakyüz 2024, arXiv 2406.01775): B and A are what a QR of W begins with."""
    _needs(w_OI, rank, "olora")
    # W = Q R: the first columns of Q are those of a QR of W's first columns, and R = Q' W. A full QR is not needed.
    w_OI = w_OI.float()
    q, _ = torch.linalg.qr(w_OI[:, :rank])
    return (q.t() @ w_OI).contiguous(), q.contiguous()


def _svd(w_OI: Tensor, rank: int, generator: torch.Generator, rounds: int | None) -> tuple[Tensor, Tensor, Tensor]:
    _needs(w_OI, rank, "a start from an SVD")
    w_OI = w_OI.float()
    if rounds is None:
        return torch.linalg.svd(w_OI, full_matrices=False)
    wide = min(2 * rank, *w_OI.shape)  # more columns than asked for, so that the last asked for are right
    q = torch.randn(w_OI.shape[1], wide, generator=generator).to(w_OI.device)
    for _ in range(rounds):
        q, _ = torch.linalg.qr(w_OI.t() @ torch.linalg.qr(w_OI @ q)[0])
    u, s, vt = torch.linalg.svd(w_OI @ q, full_matrices=False)
    return u, s, vt @ q.t()


def _needs(w_OI: Tensor, rank: int, name: str) -> None:
    if rank > min(w_OI.shape):
        raise ValueError(f"{name} of rank {rank} needs a weight with as many rows and columns, got {tuple(w_OI.shape)}")


# name -> start; the names are the values of the option `init_lora_weights`, and PEFT's
INITS: dict[str, Start] = {
    "kaiming": Start(kaiming),
    "gaussian": Start(gaussian),
    "pissa": Start(pissa, anchored=True),
    "pissa_niter_16": Start(partial(pissa, rounds=16), anchored=True),
    "milora": Start(milora, anchored=True),
    "olora": Start(olora, anchored=True),
}
