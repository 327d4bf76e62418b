"""Adapters from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.adapter.card import Adapter, Card

LAYERS = {"model.layers.0.self_attn.q_proj": (14, 10), "model.layers.1.self_attn.q_proj": (14, 10)}
LAYERS |= {"model.layers.0.mlp.down_proj": (9, 16), "model.layers.1.mlp.down_proj": (9, 16)}


def made(factors: Mapping[str, tuple[Tensor, Tensor]], **card: Any) -> Adapter:
    """Module path -> (a_RI, b_OR) as an adapter."""
    tensors = {f"{module}.a": a for module, (a, _) in factors.items()}
    tensors |= {f"{module}.b": b for module, (_, b) in factors.items()}
    ranks = {module: len(a) for module, (a, _) in factors.items()}
    return Adapter(tensors, Card("lora", {}, dict.fromkeys(ranks, 1.0), ranks, **card))


def random(seed: int, rank: int = 3, without: tuple[str, ...] = (), **card: Any) -> Adapter:
    """A random adapter of a rank, without the modules named."""
    generator = torch.Generator().manual_seed(seed)
    return made(
        {
            module: (torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator))
            for module, (o, i) in LAYERS.items()
            if module not in without
        },
        **card,
    )
