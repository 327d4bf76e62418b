"""Figures of one adapter: hand-computed, and against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from tests.measure.making import random
from veneer.measure.figures import measure
from veneer.measure.layers import by_kind, directions, each_directions, median, summary, update


def test_hand_computed() -> None:
    found = update(5, torch.tensor([4.0, 3.0], dtype=torch.float64), wanted=1)
    assert (found.rank, found.norm, found.directions_90, found.directions_99) == (5, 5.0, 2, 2)
    assert found.first == found.kept == pytest.approx(16 / 25)
    entropy = -(4 / 7) * math.log(4 / 7) - (3 / 7) * math.log(3 / 7)
    assert found.effective_rank == pytest.approx(math.exp(entropy))


def test_equal_values_and_one_value() -> None:
    found = update(10, torch.ones(10, dtype=torch.float64), wanted=10)
    assert found.directions_90 == 9  # exactly 0.9: rounding must not ask for a tenth
    assert found.effective_rank == pytest.approx(10)
    assert found.kept == 1.0
    assert update(3, torch.tensor([2.0]), wanted=2).directions_99 == 1


def test_a_zero_update_keeps_all_of_nothing() -> None:
    found = directions(torch.zeros(3, 8), torch.ones(6, 3))
    assert found.u.shape == (6, 0)
    assert update(3, found.s, 2) == update(3, torch.zeros(0), 2)
    assert update(3, found.s, 2).kept == 1.0


def test_many_at_once_are_as_each_alone() -> None:
    """Where one of them is badly conditioned, or zero, and where ranks differ."""
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(r, 20, generator=generator), torch.randn(30, r, generator=generator)) for r in (3, 5) * 4]
    nearly = torch.randn(3, 20, generator=generator)
    nearly[2] = nearly[1] + 1e-5 * nearly[2]
    for more in (
        (nearly, factors[0][1]),
        (torch.zeros(3, 20), torch.ones(30, 3)),
        (torch.eye(3, 20), torch.eye(30, 3)),
    ):
        each = [*factors, more]
        for found, (a_RI, b_OR) in zip(each_directions(each), each, strict=True):
            dense_OI = b_OR.double() @ a_RI.double()
            s_K = torch.linalg.svdvals(dense_OI)[: len(found.s)]
            torch.testing.assert_close(found.s, s_K, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close((found.u * found.s) @ found.v.mT, dense_OI, rtol=0, atol=1e-6)
            torch.testing.assert_close(found.u.mT @ found.u, torch.eye(len(found.s)).double(), rtol=0, atol=1e-7)


def test_against_dense() -> None:
    adapter = random(0, rank=4)
    found = measure([adapter], rank=2).updates[0]
    assert list(found) == adapter.modules()
    for module, one in found.items():
        a_RI, b_OR = adapter.factors(module)
        s_K = torch.linalg.svdvals(b_OR.double() @ a_RI.double())
        assert one.norm == pytest.approx(float(s_K.norm()), rel=1e-6)
        assert one.kept == pytest.approx(float(s_K[:2].square().sum() / s_K.square().sum()), rel=1e-6)
        assert one.first == pytest.approx(float(s_K[0] ** 2 / s_K.square().sum()), rel=1e-6)


def test_a_summary_weighs_layers_by_their_energy() -> None:
    adapter = random(1)
    found = measure([adapter], rank=1).updates[0]
    whole = summary(adapter, found, adapter.modules())
    squares = [one.norm**2 for one in found.values()]
    assert whole.norm == pytest.approx(math.sqrt(sum(squares)))
    assert whole.kept == pytest.approx(
        sum(one.kept * square for one, square in zip(found.values(), squares, strict=True)) / sum(squares)
    )
    assert whole.parameters == sum(t.numel() for t in adapter.tensors.values())
    assert (whole.layers, whole.rank_from, whole.rank_to) == (4, 3, 3)


def test_kinds() -> None:
    paths = ["model.layers.0.q_proj", "model.layers.10.q_proj", "model.layers.0.mlp.experts.down_proj.3", "lm_head"]
    assert by_kind(paths) == {"q_proj": paths[:2], "down_proj": [paths[2]], "lm_head": ["lm_head"]}


def test_median() -> None:
    assert (median([3, 1, 2]), median([4, 1, 2, 3])) == (2, 2.5)
