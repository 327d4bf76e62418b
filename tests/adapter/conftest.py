"""Pico models and adapters for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.adapter.card import Adapter, Card


@pytest.fixture
def pico() -> Callable[..., LlamaForCausalLM]:
    """A function that makes a random Llama of a few thousand parameters, float32."""

    def make(seed: int = 0, layers: int = 2, hidden: int = 32, **settings) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            **settings,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def adapter_for() -> Callable[..., Adapter]:
    """A function that makes a random adapter for linear layers of a model: path -> rank, or one rank for all."""

    def make(model: torch.nn.Module, ranks: dict[str, int] | int = 4, seed: int = 1, **card) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        linear = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and path != "lm_head"}
        ranks = dict.fromkeys(linear, ranks) if isinstance(ranks, int) else ranks
        tensors = {}
        for path, rank in ranks.items():
            tensors[f"{path}.a"] = torch.randn(rank, linear[path].in_features, generator=generator) / 8
            tensors[f"{path}.b"] = torch.randn(linear[path].out_features, rank, generator=generator) / 8
        about = {"method": "lora", "settings": {}, "scales": dict.fromkeys(ranks, 2.0), "ranks": ranks, **card}
        return Adapter(tensors, Card(**about))

    return make
