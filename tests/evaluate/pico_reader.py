"""A pico Llama that reads letters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.evaluate.test_run import Letters


def pico_reader() -> Any:
    """What `veneer.load` gives, of two random layers and a token a character; always the same."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    return SimpleNamespace(model=model, tokenizer=Letters(), name="stub", storage="dense float32")
