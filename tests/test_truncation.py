"""Stacking, truncation and canonical factors against dense float64, by Gram matrices and by QR."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from veneer import lowrank

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)
laws = settings(max_examples=25, deadline=None)
# By QR in float64: rounding of numbers of size one, |ΔW| up to about 30. By Gram matrices, Q is orthonormal to 1e-8.
WAYS = pytest.mark.parametrize("exact, size", [(True, 1e-12), (False, 1e-6)])


def factors(seed: int, outputs: int, inputs: int, rank: int) -> lowrank.Factors:
    draw = torch.Generator().manual_seed(seed)
    a_RI = torch.randn(rank, inputs, generator=draw, dtype=torch.float64)
    return lowrank.Factors(a_RI, torch.randn(outputs, rank, generator=draw, dtype=torch.float64))


def separated(seed: int, outputs: int, inputs: int, rank: int) -> lowrank.Factors:
    """Singular values 2^rank, ..., 4, 2."""
    a, b = factors(seed, outputs, inputs, rank)
    s = torch.tensor([2.0**k for k in range(rank, 0, -1)], dtype=torch.float64)
    return lowrank.Factors((torch.linalg.qr(a.mT)[0] * s).mT, torch.linalg.qr(b)[0])


def dense(a_RI: torch.Tensor, b_OR: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return b_OR.double() @ a_RI.double()


def mixing(seed: int, rank: int) -> torch.Tensor:
    """An invertible matrix with singular values in [0.5, 2]."""
    left, right = (torch.linalg.qr(factors(seed + i, rank, 1, rank).b)[0] for i in (0, 1))
    return left @ torch.diag(torch.linspace(0.5, 2.0, rank, dtype=torch.float64)) @ right


@laws
@given(seeds, sizes, sizes, st.lists(sizes, min_size=1, max_size=4), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_concatenation_is_the_weighted_sum(seed, outputs, inputs, ranks, weights):
    updates = [factors(seed + i, outputs, inputs, rank) for i, rank in enumerate(ranks)]
    got = lowrank.concatenate(updates, weights[: len(ranks)])
    assert got.a.shape == (sum(ranks), inputs)
    wanted = sum(w * dense(*update) for w, update in zip(weights, updates, strict=False))
    torch.testing.assert_close(dense(*got), wanted, rtol=1e-12, atol=1e-12)


@laws
@given(seeds, sizes, sizes, sizes, sizes)
def test_sum_difference_and_multiple(seed, outputs, inputs, rank1, rank2):
    one, two = factors(seed, outputs, inputs, rank1), factors(seed + 1, outputs, inputs, rank2)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(dense(*lowrank.add(*one, *two)), dense(*one) + dense(*two), **close)
    torch.testing.assert_close(dense(*lowrank.subtract(*one, *two)), dense(*one) - dense(*two), **close)
    torch.testing.assert_close(dense(*lowrank.scale(*one, -0.5)), -0.5 * dense(*one), **close)


def test_zero_products_are_left_out():
    a, b = factors(0, 5, 6, 4)
    a[1], b[:, 2] = 0, 0
    got = lowrank.without_zeros(a, b)
    assert got.a.shape == (2, 6) and torch.equal(dense(*got), dense(a, b))
    assert lowrank.without_zeros(a, torch.zeros_like(b)).b.shape == (5, 0)


@WAYS
@laws
@given(seed=seeds, outputs=sizes, inputs=sizes, rank=sizes, wanted=st.integers(0, 10))
def test_truncation_error_is_the_tail_of_the_spectrum(seed, outputs, inputs, rank, wanted, exact, size):
    a, b = factors(seed, outputs, inputs, rank)
    cut = lowrank.truncate(a, b, wanted, exact=exact)
    s = torch.linalg.svdvals(dense(a, b))
    assume(not ((s > 1e-13 * s[0]) & (s < 1e-5 * s[0])).any())  # all of it far from what counts as rounding
    assert len(cut.a) == cut.b.shape[1] == min(wanted, int((s > 1e-13 * s[0]).sum()))
    error = float((dense(a, b) - dense(*cut)).norm())
    assert error == pytest.approx(float(s[wanted:].norm()), rel=1e-6, abs=30 * size)
    assert error == pytest.approx(cut.error, rel=1e-6, abs=30 * size)
    assert cut.kept == pytest.approx(1 - float((s[wanted:].norm() / s.norm()) ** 2), abs=1e-6)


@WAYS
@laws
@given(seed=seeds, outputs=sizes, inputs=sizes, rank=sizes, energy=st.floats(0.1, 1))
def test_a_share_of_energy_takes_the_fewest_directions(seed, outputs, inputs, rank, energy, exact, size):
    a, b = factors(seed, outputs, inputs, rank)
    cut = lowrank.truncate(a, b, energy=energy, exact=exact)
    assert cut.kept >= energy - 1e-9
    fewer = lowrank.truncate(a, b, len(cut.a) - 1, exact=exact)
    assert fewer.kept < energy or energy == 1
    both = lowrank.truncate(a, b, 1, energy, exact=exact)
    assert len(both.a) == min(1, len(cut.a))


@WAYS
@laws
@given(seed=seeds, outputs=sizes, inputs=sizes, rank=sizes)
def test_canonical_factors_keep_the_update_and_share_its_size(seed, outputs, inputs, rank, exact, size):
    a, b = factors(seed, outputs, inputs, rank)
    got = lowrank.balanced(a, b, exact=exact)
    close = {"rtol": 30 * size, "atol": 30 * size}
    torch.testing.assert_close(dense(*got), dense(a, b), **close)
    torch.testing.assert_close(got.a @ got.a.mT, torch.diag(got.s[: len(got.a)]), **close)
    torch.testing.assert_close(got.b.mT @ got.b, torch.diag(got.s[: len(got.a)]), **close)
    assert bool((got.b.max(dim=0).values >= -got.b.min(dim=0).values).all())  # the sign
    assert got.a.is_contiguous() and got.b.is_contiguous()


@WAYS
@laws
@given(seed=seeds, outputs=st.integers(3, 9), inputs=st.integers(3, 9), rank=st.integers(1, 3))
def test_canonical_factors_do_not_depend_on_the_factorisation(seed, outputs, inputs, rank, exact, size):
    a, b = separated(seed, outputs, inputs, rank)
    mix = mixing(seed, rank)
    other = lowrank.balanced(torch.linalg.inv(mix) @ a, b @ mix, exact=exact)
    # Entries that tie for the largest may take either sign: compare sizes.
    for got, want in zip(other, lowrank.balanced(a, b, exact=exact), strict=True):
        torch.testing.assert_close(got.abs(), want.abs(), rtol=100 * size, atol=100 * size)


@pytest.mark.parametrize("case", ["twice the same", "nearly the same", "more ranks than rows", "far apart", "a zero"])
def test_what_gram_matrices_cannot_do_goes_to_qr(case: str):
    a, b = (x.float() for x in factors(1, 40, 30, 4))
    a, b = {
        "twice the same": lambda: (torch.cat([a, a]), torch.cat([b, b], 1)),
        "nearly the same": lambda: (torch.cat([a, a + 1e-5]), torch.cat([b, b + 1e-5], 1)),
        "more ranks than rows": lambda: (torch.cat([a] * 12), torch.cat([b] * 12, 1)),
        "far apart": lambda: (torch.cat([a * 1e12, a.flip(1)]), torch.cat([b * 1e-12, b.flip(0)], 1)),
        "a zero": lambda: (a, b * torch.tensor([1.0, 0, 1, 1])),
    }[case]()
    got = lowrank.balanced(a, b)
    error = float((dense(*got) - dense(a, b)).norm() / dense(a, b).norm())
    assert error < 3e-7  # float32 factors
    assert len(got.a) == int(torch.linalg.matrix_rank(dense(a, b), rtol=1e-7))


def test_gram_matrices_are_used_where_they_are_safe():
    """Else the speed is gone, silently."""
    a, b = (x.float() for x in factors(2, 400, 300, 64))
    assert lowrank.frame(b).inverse_RK is not None and lowrank.frame(a.mT).inverse_RK is not None
    assert lowrank.frame(b, exact=True).inverse_RK is None


def test_basis_is_orthonormal_up_to_the_limit_of_condition():
    x = factors(3, 200, 1, 8).b
    for closeness in (1e-1, 1e-2, 1e-3, 1e-4, 1e-6):
        near = lowrank.frame(torch.cat([x, x + closeness * x.flip(0)], 1).float())
        q = near.lift(torch.eye(len(near.coords_KR), dtype=torch.float64))
        torch.testing.assert_close(q.mT @ q, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-7)


def test_right_to_float32_where_a_dense_svd_in_float32_is():
    """Against dense float64: not worse than forming the sum and its SVD in float32."""
    updates = [lowrank.Factors(*(x.float() / 8 for x in factors(i, 300, 200, 8))) for i in range(4)]
    weights = [1.0, -1.0, 0.5, 0.3]
    exact = sum(w * dense(*update) for w, update in zip(weights, updates, strict=True))
    u, s, vt = torch.linalg.svd(exact)
    best = u[:, :8] * s[:8] @ vt[:8]
    u, s, vt = torch.linalg.svd(sum(w * (x.b @ x.a) for w, x in zip(weights, updates, strict=True)))
    theirs = (u[:, :8] * s[:8]).double() @ vt[:8].double()
    ours = lowrank.truncate(*lowrank.concatenate(updates, weights), 8)
    assert float((dense(*ours) - best).norm()) < float((theirs - best).norm())


def test_same_bytes_again():
    a, b = (x.float() for x in factors(4, 64, 48, 16))
    one, two = lowrank.balanced(a, b), lowrank.balanced(a.clone(), b.clone())
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_limits_that_make_no_sense_are_named():
    a, b = factors(0, 4, 5, 2)
    with pytest.raises(AssertionError, match="negative, got -1"):
        lowrank.truncate(a, b, -1)
    with pytest.raises(AssertionError, match=r"in \(0, 1\], got 0"):
        lowrank.truncate(a, b, energy=0)
    with pytest.raises(AssertionError, match="different weights: 4 x 5 and 4 x 6"):
        lowrank.concatenate([factors(0, 4, 5, 2), factors(0, 4, 6, 2)])


@WAYS
def test_rank_zero_is_an_update_of_zeros(exact, size):
    a, b = torch.zeros(0, 5), torch.zeros(4, 0)
    one = factors(0, 4, 5, 2)
    cut = lowrank.truncate(a, b, 3, exact=exact)
    assert (cut.a.shape, cut.b.shape, cut.error, cut.kept) == ((0, 5), (4, 0), 0.0, 1.0)
    assert lowrank.norm(a, b) == lowrank.effective_rank(a, b) == lowrank.inner(a, b, *one) == 0.0
    assert lowrank.cosine(a, b, *one) == lowrank.overlap(a, b, *one).output == 0.0
    assert lowrank.singular_values(a, b).shape == (0,)
    assert torch.equal(dense(*lowrank.add(a.double(), b.double(), *one)), dense(*one))


@WAYS
def test_what_cancels_is_zero_and_not_rounding(exact, size):
    """Weights of ± 1 leave nothing; 0.1 + 0.2 - 0.3 of float32 factors leaves their rounding."""
    a, b = (x.float() for x in factors(0, 40, 30, 4))
    assert len(lowrank.balanced(*lowrank.subtract(a, b, a, b), exact=exact).a) == 0
    summed = lowrank.concatenate([(a, b)] * 3, [0.1, 0.2, -0.3])
    assert len(lowrank.balanced(*summed).a) == 0


@WAYS
def test_values_that_are_not_finite_are_refused(exact, size):
    for bad in (torch.nan, torch.inf):
        a, b = factors(0, 4, 5, 2)
        a[1, 1] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            lowrank.truncate(a, b, exact=exact)
        with pytest.raises(ValueError, match="NaN or infinite"):
            lowrank.without_zeros(a, b)
