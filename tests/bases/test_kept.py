"""Decoded weights kept for a while: the same numbers, decoded once, and gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer.bases import kept
from veneer.bases.dense import Dense
from veneer.bases.kept import decoded, free_memory
from veneer.bases.nf4 import NF4


@pytest.fixture
def model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(32, 32, generator=generator).bfloat16() for _ in range(3)]
    return nn.Sequential(NF4.from_weight(weights[0]), NF4.from_weight(weights[1]), Dense.from_weight(weights[2]))


@pytest.fixture
def decodings(monkeypatch):
    made, decode = [], NF4.decode
    monkeypatch.setattr(NF4, "decode", lambda self, dtype=None: made.append(self) or decode(self, dtype))
    return made


def test_a_weight_is_decoded_once(model, decodings):
    x = torch.randn(2, 32).bfloat16()
    wanted, wanted_t = model[0].matmul(x), model[0].matmul_t(x)
    decodings.clear()
    with decoded(model) as room:
        assert room and len(decodings) == 2
        for _ in range(5):
            assert torch.equal(model[0].matmul(x), wanted) and torch.equal(model[0].matmul_t(x), wanted_t)
        assert len(decodings) == 2
        model[0].matmul(x.float())  # another dtype is another weight
        assert len(decodings) == 3
        assert not any("held" in key for key in model.state_dict())
    assert model[0].held is None and model[1].held is None


def test_one_inside_another_leaves_it(model):
    with decoded(model):
        with decoded(model) as again:
            assert not again
        assert model[0].held is not None


def test_nothing_is_kept_where_memory_is_short(model, monkeypatch):
    needed = 2 * 32 * 32 * 2
    monkeypatch.setattr(kept, "free_memory", lambda device: needed / kept.SHARE - 1)
    with decoded(model) as room:
        assert not room and model[0].held is None
    monkeypatch.setattr(kept, "free_memory", lambda device: needed / kept.SHARE)
    with decoded(model) as room:
        assert room


def test_an_error_lets_go(model):
    with pytest.raises(RuntimeError), decoded(model):
        raise RuntimeError
    assert model[0].held is None


def test_free_memory():
    assert free_memory(torch.device("cpu")) >= 0
