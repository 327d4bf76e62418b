"""Intruder dimensions: planted ones are found, and the cheap way decides as the whole SVD does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.measure import intruders as module_under_test
from veneer.measure.intruders import THRESHOLD, cosines, intruders


def base(outputs: int, inputs: int, decay: float = 0.85, seed: int = 0) -> Tensor:
    """With singular values that fall by `decay`, as those of trained weights do at first."""
    generator = torch.Generator().manual_seed(seed)
    k = min(outputs, inputs)
    u = torch.linalg.qr(torch.randn(outputs, k, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(inputs, k, generator=generator))[0]
    return (u * decay ** torch.arange(k)) @ v.mT + 0.001 * torch.randn(outputs, inputs, generator=generator)


def planted(weight_OI: Tensor, count: int, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    u = torch.linalg.qr(torch.randn(len(weight_OI), count, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(weight_OI.shape[1], count, generator=generator))[0]
    return weight_OI + size * u @ v.mT


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_planted_directions_are_found(shape: tuple[int, int]) -> None:
    weight_OI = base(*shape)
    assert intruders(weight_OI, weight_OI) == 0
    assert intruders(weight_OI, planted(weight_OI, 3, size=3.0)) == 3
    assert intruders(weight_OI, planted(weight_OI, 3, size=0.01)) == 0


def test_against_a_whole_svd_in_float64() -> None:
    weight_OI = base(40, 70)
    tuned_OI = planted(weight_OI, 4, size=0.6)
    u = torch.linalg.svd(weight_OI.double(), full_matrices=False)[0]
    y = torch.linalg.svd(tuned_OI.double(), full_matrices=False)[0][:, :10]
    assert cosines(weight_OI, tuned_OI).tolist() == pytest.approx((u.mT @ y).abs().amax(0).tolist(), abs=1e-4)


@pytest.mark.parametrize("size", [0.0, 0.02, 0.5, 3.0])
def test_the_partial_svd_decides_as_the_whole_one(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    weight_OI = base(200, 260)
    tuned_OI = planted(weight_OI, 4, size)
    whole = cosines(weight_OI, tuned_OI)
    monkeypatch.setattr(module_under_test, "_SMALL", 0)
    assert ((cosines(weight_OI, tuned_OI) < THRESHOLD) == (whole < THRESHOLD)).all()


def test_a_healthy_layer_needs_no_whole_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = base(200, 260)
    monkeypatch.setattr(module_under_test, "_SMALL", 0)
    monkeypatch.setattr(module_under_test, "_whole", lambda weight: pytest.fail("a whole SVD"))
    assert intruders(weight_OI, planted(weight_OI, 4, size=0.02)) == 0


def test_the_generator_of_the_caller_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_SMALL", 0)
    before = torch.get_rng_state()
    cosines(base(60, 60), base(60, 60))
    assert torch.equal(before, torch.get_rng_state())


def test_few_directions() -> None:
    assert cosines(torch.eye(4), 2 * torch.eye(4)).shape == (4,)
