"""Every measure of a pair: hand-computed cases, and an oracle on dense float64 matrices."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.measure.making import LAYERS, made, random
from veneer.adapter.card import Adapter
from veneer.measure import pairs as module_under_test
from veneer.measure.figures import measure
from veneer.measure.pairs import Pair

EYE = torch.eye(8)
LAYER = "model.layers.0.mlp.up_proj"


def pair(first: Adapter, second: Adapter) -> Pair:
    [found] = measure([first, second], rank=4).pairs
    return found


def dense(adapter: Adapter, module: str) -> Tensor:
    a_RI, b_OR = adapter.factors(module)
    return b_OR.double() @ a_RI.double()


def test_an_adapter_beside_itself_its_opposite_and_its_double() -> None:
    b_OR = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    one = made({LAYER: (EYE[:3], b_OR)})
    same = pair(one, one)
    assert same.cosine == pytest.approx(1, abs=1e-6)
    assert (same.output, same.input) == pytest.approx((1, 1), abs=1e-5)
    assert (same.output_chance, same.input_chance) == pytest.approx((3 / 8, 3 / 8))
    assert same.interference_share == pytest.approx(1, abs=1e-5)
    assert (same.sign_conflict, same.sign_conflict_weighted) == pytest.approx((-0.5, -0.5), abs=1e-6)
    opposite = pair(one, made({LAYER: (EYE[:3], -b_OR)}))
    assert opposite.cosine == pytest.approx(-1, abs=1e-6)
    assert opposite.sign_conflict_weighted == pytest.approx(0.5, abs=1e-6)
    assert opposite.interference_share == pytest.approx(1, abs=1e-5)
    assert pair(one, made({LAYER: (EYE[:3], 2 * b_OR)})).norm_ratio == pytest.approx(0.5)


def test_orthogonal_spaces_do_not_interfere() -> None:
    found = pair(made({LAYER: (EYE[:2], EYE[:, :2])}), made({LAYER: (EYE[4:6], EYE[:, 4:6])}))
    assert (found.cosine, found.output, found.input, found.interference) == (0, 0, 0, 0)
    assert (found.sign_conflict, found.sign_conflict_weighted) == (0, 0)  # no entry is of both


def test_shared_outputs_alone_are_no_interference() -> None:
    found = pair(made({LAYER: (EYE[:2], EYE[:, :2])}), made({LAYER: (EYE[4:6], EYE[:, :2])}))
    assert (found.output, found.input, found.interference) == (1, 0, 0)


def test_interference_by_hand() -> None:
    """One direction each, at 60 degrees on both sides: ‖.‖₁ of the two blocks is 0.25 s₂ + 0.25 s₁."""
    half = torch.tensor([[0.5, 0.75**0.5, 0, 0, 0, 0, 0, 0]])
    found = pair(made({LAYER: (EYE[:1], 2 * EYE[:, :1])}), made({LAYER: (half, 4 * half.mT)}))
    assert found.interference == pytest.approx(0.25 * 2 + 0.25 * 4, rel=1e-6)
    assert found.interference_share == pytest.approx(0.25, rel=1e-6)
    assert found.cosine == pytest.approx(0.25, rel=1e-6)


def test_no_layer_in_common_is_nothing_measured() -> None:
    half = tuple(LAYERS)[:2]
    found = pair(random(0, without=half), random(1, without=tuple(LAYERS)[2:]))
    assert found == Pair(0, 1, 0)


def test_a_zero_adapter() -> None:
    zero = made({module: (torch.ones(2, i), torch.zeros(o, 2)) for module, (o, i) in LAYERS.items()})
    found = pair(random(0), zero)
    assert found.norm_ratio is None
    assert (found.cosine, found.output, found.interference_share) == (0, 0, 0)


def oracle(first: Adapter, second: Adapter) -> dict[str, float]:
    """All measures from dense matrices, layer by layer."""
    sums = dict.fromkeys(("inner", "output", "input", "sti", "s", "xy", "abs", "differ", "entries"), 0.0)
    norms = [sum(float(dense(one, m).square().sum()) for m in one.modules()) ** 0.5 for one in (first, second)]
    both = [module for module in first.modules() if module in second.modules()]
    for module in both:
        x, y = dense(first, module), dense(second, module)
        (u1, s1, v1), (u2, s2, v2) = (_svd(matrix) for matrix in (x, y))
        u, v, s = torch.cat([u1, u2], 1), torch.cat([v1, v2], 1), torch.cat([s1, s2])
        eye = torch.eye(len(s), dtype=torch.float64)
        sums["sti"] += float(((u.mT @ u - eye) @ s.diag() @ (v.mT @ v - eye)).abs().sum())
        sums["s"] += float(s.sum())
        fewer = min(len(s1), len(s2))
        sums["output"] += float((u1.mT @ u2).square().sum()) / fewer / len(both)
        sums["input"] += float((v1.mT @ v2).square().sum()) / fewer / len(both)
        sums["inner"] += float((x * y).sum())
        sums["xy"] += float((x * y).sum())
        sums["abs"] += float((x * y).abs().sum())
        sums["differ"] += float((x.sign() != y.sign()).sum())
        sums["entries"] += x.numel()
    return {
        "norm_ratio": norms[0] / norms[1],
        "cosine": sums["inner"] / norms[0] / norms[1],
        "output": sums["output"],
        "input": sums["input"],
        "sign_conflict": sums["differ"] / sums["entries"] - 0.5,
        "sign_conflict_weighted": -sums["xy"] / sums["abs"] / 2,
        "interference": sums["sti"] / len(both),
        "interference_share": sums["sti"] / sums["s"],
    }


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept], s[kept], vt[kept].mT


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 12), st.booleans())
def test_against_dense(seed: int, rank: int, other: int, lacking: bool) -> None:
    first, second = random(seed, rank), random(seed + 1, other, tuple(LAYERS)[:1] if lacking else ())
    found = pair(first, second)
    assert found.layers == 4 - lacking
    for name, value in oracle(first, second).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_how_it_is_cut_into_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [random(seed, 1 + seed % 4, tuple(LAYERS)[: seed % 2]) for seed in range(7)]
    whole = measure(adapters, rank=2).pairs
    monkeypatch.setattr(module_under_test, "_BLOCK", 1)
    for one, other in zip(whole, measure(adapters, rank=2).pairs, strict=True):
        assert (one.first, one.second, one.layers) == (other.first, other.second, other.layers)
        assert one.interference == pytest.approx(other.interference, rel=1e-5)
        assert one.sign_conflict_weighted == pytest.approx(other.sign_conflict_weighted, rel=1e-5, abs=1e-7)
        assert one.cosine == pytest.approx(other.cosine, rel=1e-5, abs=1e-7)


def test_many_at_once_are_as_each_two_alone() -> None:
    """More than are decomposed together, and than stand in a block of rows; of several ranks, one lacking a layer."""
    adapters = [random(seed, 1 + seed % 5, tuple(LAYERS)[: seed % 7 == 3]) for seed in range(70)]
    adapters[66] = made({module: (torch.ones(2, i), torch.zeros(o, 2)) for module, (o, i) in LAYERS.items()})
    found = {(one.first, one.second): one for one in measure(adapters, rank=2).pairs}
    assert len(found) == 70 * 69 // 2
    for i, j in ((0, 1), (3, 64), (10, 66), (63, 64), (64, 69), (66, 69)):
        alone = asdict(replace(pair(adapters[i], adapters[j]), first=i, second=j))
        for name, value in asdict(found[i, j]).items():
            assert value == (alone[name] and pytest.approx(alone[name], rel=1e-5, abs=1e-6)), (i, j, name)


def test_the_split_into_factors_does_not_count() -> None:
    first, second = random(0, 3), random(1, 3)
    mixed_RR = torch.tensor([[2.0, 1, 0], [0, 1, 0], [1, 0, 0.5]])
    again = made(
        {m: (mixed_RR @ a, b @ torch.linalg.inv(mixed_RR)) for m in first.modules() for a, b in [first.factors(m)]}
    )
    one, other = pair(first, second), pair(again, second)
    for name in ("cosine", "output", "input", "interference", "sign_conflict_weighted"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4, abs=1e-6)
