"""Decoded weights that are kept for a while, where memory is plenty: all of a model, or those of one layer.

Text is written token by token: thousands of small products with the same weights. Decoding 4-bit weights for each of
them takes many times as long as the products; what is kept are the same numbers. A layer that is computed twice meets
each of its weights twice in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from veneer.bases.quantised import Quantised

SHARE = 0.5  # of the memory that is free


@contextmanager
def decoded(model: nn.Module) -> Iterator[bool]:
    """While inside, quantised layers multiply by weights that were decoded once; says whether there was room."""
    bases = [m for m in model.modules() if isinstance(m, Quantised) and m.adds and m.held is None]
    room = bool(bases) and _decoded_size(bases) <= SHARE * free_memory(bases[0].device)
    try:
        if room:
            for base in bases:
                base.held = base.decode()
        yield room
    finally:
        for base in bases:
            base.held = None


@contextmanager
def decoded_once(module: nn.Module) -> Iterator[None]:
    """While inside, each quantised layer of `module` is decoded at its first product and keeps that for the others."""
    bases = [m for m in module.modules() if isinstance(m, Quantised) and m.held is None]
    for base in bases:
        base.holding = True
    try:
        yield
    finally:
        for base in bases:
            base.held, base.holding = None, False


def decoded_bytes(module: nn.Module) -> int:
    """What the quantised layers of `module` take when they are decoded."""
    return _decoded_size([m for m in module.modules() if isinstance(m, Quantised)])


def _decoded_size(bases: Sequence[Quantised]) -> int:
    """Bytes."""
    return sum(base.out_features * base.in_features * base.dtype.itemsize for base in bases)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")
    return int(kib) * 1024
