"""The sum of all adapters: retained energy and alignment against dense matrices."""

from __future__ import annotations

import pytest
import torch

from tests.measure.making import LAYERS, made, random
from veneer.measure.figures import measure

EYE = torch.eye(8)
LAYER = "model.layers.0.mlp.up_proj"


def test_by_hand() -> None:
    """Updates 3 e₀e₀ᵀ and 1 e₁e₁ᵀ: at rank 1 the sum keeps 9/10; 95 % of it needs both directions."""
    first, second = made({LAYER: (EYE[:1], 3 * EYE[:, :1])}), made({LAYER: (EYE[1:2], EYE[:, 1:2])})
    found = measure([first, second], rank=1).together
    assert found is not None
    assert found.kept == pytest.approx(0.9)
    assert found.alignment == pytest.approx((1, 1))
    small = made({LAYER: (EYE[1:2], 0.5 * EYE[:, 1:2])})  # 97 % are in one direction: the other is not aligned
    found = measure([first, small], rank=1).together
    assert found is not None
    assert found.alignment == pytest.approx((1, 0), abs=1e-7)


def test_against_dense() -> None:
    adapters = [random(0, 2), random(1, 3, tuple(LAYERS)[:1]), random(2, 5)]
    found = measure(adapters, rank=4).together
    assert found is not None
    kept = whole = 0.0
    ratios: list[list[float]] = [[], [], []]
    for module in LAYERS:
        dense = {
            i: b.double() @ a.double()
            for i, x in enumerate(adapters)
            if module in x.modules()
            for a, b in [x.factors(module)]
        }
        u, s, _ = torch.linalg.svd(torch.stack(list(dense.values())).sum(0), full_matrices=False)
        energy = s.square()
        kept, whole = kept + float(energy[:4].sum()), whole + float(energy.sum())
        assert found.kept_by_layer[module] == pytest.approx(float(energy[:4].sum() / energy.sum()), rel=1e-6)
        enough = next(k for k in range(1, len(s) + 1) if float(energy[:k].sum()) >= 0.95 * float(energy.sum()))
        for i, delta in dense.items():
            ratios[i].append(float((u[:, :enough] @ u[:, :enough].mT @ delta).norm() / delta.norm()))
    assert found.kept == pytest.approx(kept / whole, rel=1e-6)
    assert found.alignment == pytest.approx(tuple(sum(each) / len(each) for each in ratios), rel=1e-6)


def test_adapters_that_cancel_keep_all_of_nothing() -> None:
    one = made({LAYER: (EYE[:2], EYE[:, :2])})
    found = measure([one, made({LAYER: (EYE[:2], -EYE[:, :2])})], rank=1).together
    assert found is not None
    assert found.kept == 1.0
    assert all(ratio is not None and ratio <= 1 for ratio in found.alignment)


def test_a_zero_adapter_has_no_alignment() -> None:
    zero = made({LAYER: (EYE[:1], torch.zeros(8, 1))})
    found = measure([made({LAYER: (EYE[:2], EYE[:, :2])}), zero], rank=2).together
    assert found is not None
    assert found.alignment[1] is None
    assert measure([zero], rank=2).together is None  # of one there is nothing to sum
