"""The laws of LOSSES: (model, stream, targets) -> sum and count per segment.

A hand-computed case; masked tokens change nothing; one segment's NaN stays its own, in value and in gradient.
"""

from __future__ import annotations

import math
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PretrainedConfig

from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings
from veneer.model.losses import LOSSES, targets_of
from veneer.model.packed import running
from veneer.model.stream import pack

OPTIONS = {"dpo": {"beta": 0.5}}
BY_SEQUENCE = [name for name in LOSSES if name != "dpo"]  # those that know no pairs


def loss_of(name: str):
    module, _, attribute = LOSSES[name].partition(":")
    return partial(getattr(import_module(module), attribute), **OPTIONS.get(name, {}))


class Body(nn.Module):
    """What gives the hidden states: here each token's row."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids, **unused):
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


class Table(nn.Module):
    """A model without layers: its logits after token t are row t of a table, so that a loss is computed by hand."""

    def __init__(self, logits_VV: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(logits_VV, freeze=False)
        self.head = nn.Linear(len(logits_VV), len(logits_VV), bias=False)
        self.head.weight.data = torch.eye(len(logits_VV))
        self.head.weight.requires_grad_(False)
        self.config, self.body = PretrainedConfig(), Body(self.table)

    @property
    def base_model(self):
        return self.body

    def get_output_embeddings(self):
        return self.head


# After token 0: 3/4 for token 0; after token 1: 1/2; after token 2: 1/8.
TABLE = torch.tensor([[0.75, 0.125, 0.125], [0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]).log()


def run(name: str, model: nn.Module, sequences, trained, slots=None):
    stream = pack(sequences, slots)
    with running(model, stream):
        return loss_of(name)(model, stream, targets_of(stream, trained))


def test_the_hand_computed_case_of_cross_entropy():
    """Two segments: 0→1→0 with both trained, -ln(1/8) - ln(1/2) = ln 16; 2→2→1 with the first trained, -ln(3/4)."""
    model = Table(TABLE)
    sums_S, counts_S = run("cross_entropy", model, [[0, 1, 0], [2, 2, 1]], [[True] * 3, [False, True, False]])
    torch.testing.assert_close(sums_S, torch.tensor([math.log(16), math.log(4 / 3)]))
    assert counts_S.tolist() == [2, 1]
    assert sums_S.dtype == torch.float32
    sums_S.sum().backward()
    # Gradient of a row of logits: probabilities minus the truth.
    wanted = torch.tensor([[0.75, -0.875, 0.125], [-0.5, 0.25, 0.25], [0.125, 0.125, -0.25]])
    torch.testing.assert_close(model.table.weight.grad, wanted)


@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_segments_without_targets_have_sum_and_count_zero(name):
    sums_S, counts_S = run(name, Table(TABLE), [[0], [0, 1], [2, 1]], [[True], [True, False], [False, True]])
    assert sums_S[:2].tolist() == [0, 0] and counts_S.tolist() == [0, 0, 1]
    sums_S, counts_S = run(name, Table(TABLE), [[0], [1]], [[True], [True]])
    assert sums_S.tolist() == counts_S.tolist() == [0, 0]


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4), data=st.data())
def test_masked_tokens_change_nothing(name, lengths, data):
    """What a masked token is, is nobody's loss (here the next token's context is the token before it alone)."""
    ids = [data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for n in lengths]
    trained = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    # A token's logits come from the one before: that one, though masked, must stay where the next is trained on.
    free = [[not t and not (i + 1 < len(flags) and flags[i + 1]) for i, t in enumerate(flags)] for flags in trained]
    other = [
        [(token + 1) % 3 if change else token for token, change in zip(row, changes, strict=True)]
        for row, changes in zip(ids, free, strict=True)
    ]
    first, second = run(name, Table(TABLE), ids, trained), run(name, Table(TABLE), other, trained)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    if name in BY_SEQUENCE:
        assert first[1].tolist() == [sum(flags[1:]) for flags in trained]


@pytest.mark.parametrize("name", BY_SEQUENCE)
@given(lengths=st.lists(st.integers(2, 6), min_size=1, max_size=4), data=st.data())
def test_segments_do_not_depend_on_their_neighbours(name, lengths, data):
    ids = [data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for n in lengths]
    trained = [[True] * n for n in lengths]
    sums_S, counts_S = run(name, Table(TABLE), ids, trained)
    for i, row in enumerate(ids):
        alone = run(name, Table(TABLE), [row], [trained[i]])
        torch.testing.assert_close(sums_S[i], alone[0][0])
        assert counts_S[i] == alone[1][0]


@pytest.mark.parametrize("name", BY_SEQUENCE)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_one_segments_nan_stays_its_own(name, poison, pico):
    """In a real model with two slots: the other slot's loss and gradients are as if alone."""
    for slot in ("good", "bad"):
        attach(pico, LoraSettings(r=2), slot)
        for method in methods_of(pico, slot).values():
            method.b_OR.data = torch.randn(method.b_OR.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    sequences = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14]]
    trained = [[True] * len(ids) for ids in sequences]

    def step(*slots):
        pico.zero_grad()
        stream = pack(sequences[: len(slots)], slots)
        with running(pico, stream):
            sums_S, _ = loss_of(name)(pico, stream, targets_of(stream, trained[: len(slots)]))
            sums_S.sum().backward()
        return sums_S.detach(), {path: m.a_RI.grad.clone() for path, m in methods_of(pico, "good").items()}

    wanted, gradients = step("good")
    next(iter(methods_of(pico, "bad").values())).a_RI.data.fill_(poison)
    got, beside = step("good", "bad", "bad")
    assert got[1:].isnan().all() and torch.isclose(got[0], wanted[0])
    for path, gradient in gradients.items():
        torch.testing.assert_close(beside[path], gradient, rtol=1e-3, atol=1e-6)  # another order of sums
    assert any(m.a_RI.grad.isnan().any() for m in methods_of(pico, "bad").values())


def test_the_hand_computed_case_of_dpo(pico):
    """With β = 1/2 and margins of 0, an adapter that is the base: ln 2 for each pair, where its chosen one stands."""
    attach(pico, LoraSettings(r=2), "one")
    sequences = [[3, 4, 5], [3, 4, 6, 7], [8, 9], [8, 10], [11, 12]]
    sums_S, counts_S = run("dpo", pico, sequences, [[False, *[True] * (len(s) - 1)] for s in sequences], ["one"] * 5)
    torch.testing.assert_close(sums_S, math.log(2) * torch.tensor([1.0, 0, 1, 0, 0]))
    assert counts_S.tolist() == [1, 0, 1, 0, 0]


def test_one_pairs_nan_stays_its_own(pico):
    for slot in ("good", "bad"):
        attach(pico, LoraSettings(r=2), slot)
    sequences = [[3, 4, 5], [3, 4, 6, 7], [8, 9], [8, 10]]
    next(iter(methods_of(pico, "bad").values())).a_RI.data.fill_(float("nan"))
    stream = pack(sequences, ["good", "good", "bad", "bad"])
    with running(pico, stream):
        sums_S, _ = loss_of("dpo")(pico, stream, targets_of(stream, [[True] * len(ids) for ids in sequences]))
        sums_S.sum().backward()
    assert sums_S[:2].tolist() == [pytest.approx(math.log(2)), 0] and sums_S[2].isnan()
    assert all(m.b_OR.grad.isfinite().all() for m in methods_of(pico, "good").values())


@pytest.mark.parametrize("name", LOSSES)
def test_the_head_is_frozen(name, pico):
    attach(pico, LoraSettings(r=2))
    stream = pack([[3, 4, 5]], ["default"])
    with running(pico, stream):
        sums_S, _ = loss_of(name)(pico, stream, targets_of(stream, [[True] * 3]))
        sums_S.sum().backward()
    assert pico.get_output_embeddings().weight.grad is None
