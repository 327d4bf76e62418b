"""Adapters to merge, made up: eight of rank 16, with weights of both signs."""

from __future__ import annotations

from typing import Any

RANK = 16
WEIGHTS = (1.0, -1.0, 0.5, 0.3, 0.7, 1.0, -0.2, 2.0)


def adapters(outputs: int, inputs: int, seed: int) -> list[tuple[Any, Any]]:
    """Factors a (R, I), b (O, R) for each weight, whose directions fall off like those of trained ones."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    fall_R = 0.8 ** torch.arange(RANK)
    return [
        (torch.randn(RANK, inputs, generator=draw) * 0.02, torch.randn(outputs, RANK, generator=draw) * 0.02 * fall_R)
        for _ in WEIGHTS
    ]
