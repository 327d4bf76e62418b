"""Low-rank maths against a dense float64 oracle: every function, on every shape, and blind to the factorisation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from veneer import lowrank

# float64 on entries of size one: QR, SVD and the products lose a few units in 1e-16 times the size (< 10).
CLOSE = {"rtol": 1e-9, "atol": 1e-10}

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)
laws = settings(max_examples=60, deadline=None)


def factors(seed: int, outputs: int, inputs: int, rank: int, dtype: torch.dtype = torch.float64):
    draw = torch.Generator().manual_seed(seed)
    a_RI = torch.randn(rank, inputs, generator=draw, dtype=torch.float64)
    b_OR = torch.randn(outputs, rank, generator=draw, dtype=torch.float64)
    return a_RI.to(dtype), b_OR.to(dtype)


def dense(a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    return b_OR.double() @ a_RI.double()


def entropy_rank(s: torch.Tensor) -> float:
    parts = [float(x / s.sum()) for x in s if x > 1e-13 * s[0]]
    return math.exp(-sum(p * math.log(p) for p in parts))


@laws
@given(seeds, sizes, sizes, sizes)
def test_norm_singular_values_and_effective_rank_match_dense_svd(seed, outputs, inputs, rank):
    a, b = factors(seed, outputs, inputs, rank)
    s_dense = torch.linalg.svdvals(dense(a, b))
    s = lowrank.singular_values(a, b)
    assert s.dtype == torch.float64
    torch.testing.assert_close(s, s_dense[: s.numel()], **CLOSE)
    assert s.numel() == min(outputs, inputs, rank)
    assert lowrank.norm(a, b) == pytest.approx(float(dense(a, b).norm()), rel=1e-9)
    assert lowrank.effective_rank(a, b) == pytest.approx(entropy_rank(s_dense), rel=1e-8)


@laws
@given(seeds, sizes, sizes, sizes)
def test_svd_rebuilds_the_update_from_orthonormal_columns(seed, outputs, inputs, rank):
    a, b = factors(seed, outputs, inputs, rank)
    u, s, v = lowrank.svd(a, b)
    torch.testing.assert_close(u @ torch.diag(s) @ v.mT, dense(a, b), **CLOSE)
    eye = torch.eye(s.numel(), dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, eye, **CLOSE)
    torch.testing.assert_close(v.mT @ v, eye, **CLOSE)


def dense_overlap(first: torch.Tensor, second: torch.Tensor, rank1: int, rank2: int) -> tuple[float, float, float]:
    u1, _, v1 = torch.linalg.svd(first)
    u2, _, v2 = torch.linalg.svd(second)
    smaller = min(rank1, rank2)
    output = float((u1[:, :rank1].mT @ u2[:, :rank2]).square().sum()) / smaller
    inputs = float((v1[:rank1] @ v2[:rank2].mT).square().sum()) / smaller
    return float((first * second).sum() / (first.norm() * second.norm())), output, inputs


@laws
@given(seeds, sizes, sizes, sizes, sizes)
def test_overlap_matches_dense(seed, outputs, inputs, rank1, rank2):
    one, two = factors(seed, outputs, inputs, rank1), factors(seed + 1, outputs, inputs, rank2)
    k1, k2 = min(outputs, inputs, rank1), min(outputs, inputs, rank2)
    got = lowrank.overlap(*one, *two)
    assert (got.cosine, got.output, got.input) == pytest.approx(
        dense_overlap(dense(*one), dense(*two), k1, k2), rel=1e-6, abs=1e-8
    )
    assert (got.output_chance, got.input_chance) == (max(k1, k2) / outputs, max(k1, k2) / inputs)
    assert lowrank.inner(*one, *two) == pytest.approx(float((dense(*one) * dense(*two)).sum()), rel=1e-9, abs=1e-9)


def test_overlap_of_an_update_with_itself_its_negative_and_a_stranger():
    a, b = factors(0, 8, 6, 2)
    same = lowrank.overlap(a, b, 3 * a, b)
    assert (same.cosine, same.output, same.input) == pytest.approx((1, 1, 1))
    assert lowrank.overlap(a, b, -a, b).cosine == pytest.approx(-1)
    eye = torch.eye(4)
    stranger = lowrank.overlap(eye[:2], eye[:, :2], eye[2:], eye[:, 2:])
    assert (stranger.cosine, stranger.output, stranger.input) == (0, 0, 0)


def test_overlap_inside_a_larger_space_is_one():
    a, b = factors(1, 8, 7, 3)
    part = lowrank.truncate(a, b, 1)[:2]
    assert lowrank.overlap(*part, a, b).output == pytest.approx(1)
    assert lowrank.overlap(*part, a, b).input == pytest.approx(1)


def test_overlap_ignores_directions_that_are_rounding():
    a, b = factors(2, 30, 20, 2, torch.float32)
    noisy_a = torch.cat([a, 1e-5 * factors(7, 1, 20, 2, torch.float32)[0]])
    noisy_b = torch.cat([b, 1e-5 * factors(8, 30, 1, 2, torch.float32)[1]], dim=1)
    other = factors(9, 30, 20, 2, torch.float32)
    clean = lowrank.overlap(a, b, *other)
    assert lowrank.overlap(noisy_a, noisy_b, *other).output == pytest.approx(clean.output, rel=1e-3)


def test_zero_update():
    a, b = factors(4, 5, 6, 3)
    zero = torch.zeros_like(b)
    assert lowrank.norm(a, zero) == 0.0
    assert lowrank.effective_rank(a, zero) == 0.0
    got = lowrank.overlap(a, zero, a, b)
    assert (got.cosine, got.output, got.input) == (0.0, 0.0, 0.0)
    assert [len(cosines) for cosines in lowrank.principal_angles(a, zero, a, b)] == [0, 0]
    assert lowrank.truncate(a, zero, 2).a.shape == (0, 6)


def test_effective_rank_of_equal_and_of_single_directions():
    eye = torch.eye(6)
    assert lowrank.effective_rank(eye[:4], eye[:, :4]) == pytest.approx(4)
    assert lowrank.effective_rank(eye[:4], torch.ones(6, 4)) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float64_inside_whatever_comes_in(dtype):
    a, b = factors(5, 40, 30, 4, dtype)
    assert lowrank.norm(a, b) == pytest.approx(float(dense(a, b).norm()), rel=1e-12)
    a_bal, b_bal, _ = lowrank.balanced(a, b)
    assert a_bal.dtype == b_bal.dtype == dtype


def test_norm_does_not_cancel():
    """B's columns nearly undo each other: the trace formula would be left with rounding alone."""
    a = torch.ones(2, 50, dtype=torch.float64)
    b = torch.ones(50, 2, dtype=torch.float64)
    b[:, 1] = -1.0 + 1e-9
    exact = 50 * 1e-9
    assert lowrank.norm(a, b) == pytest.approx(exact, rel=1e-5)


def test_never_forms_the_product():
    """A dense ΔW of this size would need 320 GB."""
    a, b = factors(6, 1, 200_000, 2)[0], factors(6, 200_000, 1, 2)[1]
    assert lowrank.norm(a, b) > 0
    assert lowrank.effective_rank(a, b) <= 2 + 1e-9
    assert lowrank.overlap(a, b, a, b).cosine == pytest.approx(1)


@pytest.mark.parametrize("a_shape, b_shape", [((2, 5), (4, 3)), ((5,), (4, 5)), ((2, 5), (2, 4))])
def test_factors_that_do_not_chain_are_named(a_shape, b_shape):
    with pytest.raises(AssertionError, match="do not chain"):
        lowrank.norm(torch.zeros(a_shape), torch.zeros(b_shape))


def test_updates_of_different_weights_are_named():
    for measure in (lowrank.overlap, lowrank.principal_angles):
        with pytest.raises(AssertionError, match="different weights"):
            measure(*factors(0, 4, 5, 2), *factors(0, 4, 6, 2))


@laws
@given(seeds, sizes, sizes, sizes, sizes)
def test_principal_angles_match_dense(seed, outputs, inputs, rank1, rank2):
    one, two = factors(seed, outputs, inputs, rank1), factors(seed + 1, outputs, inputs, rank2)
    k1, k2 = min(outputs, inputs, rank1), min(outputs, inputs, rank2)
    u1, s1, v1 = torch.linalg.svd(dense(*one))
    u2, s2, v2 = torch.linalg.svd(dense(*two))
    assume(s1[k1 - 1] > 1e-4 * s1[0] and s2[k2 - 1] > 1e-4 * s2[0])  # far from what counts as rounding
    output, read = lowrank.principal_angles(*one, *two)
    torch.testing.assert_close(output, torch.linalg.svdvals(u1[:, :k1].mT @ u2[:, :k2]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(read, torch.linalg.svdvals(v1[:k1] @ v2[:k2].mT), rtol=1e-6, atol=1e-7)
