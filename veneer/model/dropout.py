"""Stateless dropout: a mask is a function of (key of the step, module, row); recompute and resume draw it again."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def dropout_key(seed: int, job: str, step: int) -> int:
    """The key of one job's micro-step."""
    return _hash(f"{seed}/{job}/{step}")


def dropout_mask(key: int, module: str, rows: int, like: Tensor, probability: float) -> Tensor:
    """Inverted-dropout factors (rows, I): 0 with `probability`, else 1 / (1 - probability), in like's dtype.

    Rows are counted within the job's span, so a job draws the same mask alone and beside others.
    """
    generator = torch.Generator(like.device).manual_seed(_hash(f"{key}/{module}"))
    kept = torch.rand(rows, like.shape[1], generator=generator, device=like.device) >= probability
    return kept.to(like.dtype) / (1.0 - probability)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
