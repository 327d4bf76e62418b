"""Decoded weights that are kept for a while, where memory is plenty.

Text is written token by token: thousands of small products with the same weights. Decoding 4-bit weights for each of
them takes many times as long as the products; what is kept are the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    needed = sum(base.out_features * base.in_features * base.dtype.itemsize for base in bases)
    room = bool(bases) and needed <= SHARE * free_memory(bases[0].device)
    try:
        if room:
            for base in bases:
                base.held = base.decode()
        yield room
    finally:
        for base in bases:
            base.held = None


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
