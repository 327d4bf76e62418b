"""Metrics by hand-computed cases; intervals by what they promise: coverage, pairing, sameness, no false certainty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import DataError
from veneer.evaluate import intervals, metrics
from veneer.evaluate.intervals import MEAN, PERPLEXITY, RATIO, Score, weighted

shares = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=30)


@pytest.mark.parametrize(
    "prediction, reference, exact, label",
    [
        ("Positive", "positive", 0, 1),
        (" positive\n", "positive", 1, 1),
        ("positive.", "positive", 0, 1),
        ("positive", "Positive.", 0, 1),
        ("very  positive", "very positive", 0, 1),
        ("positive .", "positive", 0, 1),
        ("positive!", "positive", 0, 0),
        ("positive..", "positive", 0, 0),
        ("not positive", "positive", 0, 0),
        ("STRASSE", "straße", 0, 1),
        ("", "positive", 0, 0),
    ],
)
def test_what_counts_as_equal(prediction, reference, exact, label):
    assert metrics.exact_match([prediction], [[reference]]) == [exact]
    assert metrics.accuracy([prediction], [[reference]]) == [label]


@pytest.mark.parametrize("measure", [metrics.exact_match, metrics.accuracy])
def test_any_reference_will_do_and_none_matches_nothing(measure):
    assert measure(["b", "b"], [["a", "b"], []]) == [1.0, 0.0]


@given(shares, st.integers(0, 2**40))
def test_score_is_the_mean_inside_its_interval(values, seed):
    got = MEAN.score(weighted(values), seed)
    assert got.score == pytest.approx(np.mean(values))
    assert got.n == len(values)
    assert 0 <= got.low <= got.score <= got.high <= 1
    assert got.low < got.high


def test_interval_against_numpy_bootstrap():
    values = (np.arange(200) % 5 == 0).astype(float)
    draws = np.random.default_rng(0).choice(values, size=(20_000, 200)).mean(axis=1)
    got = MEAN.score(weighted(values))
    assert (got.low, got.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)  # one row = 0.005


def test_same_numbers_everywhere():
    """Written down once: another platform, NumPy or summation order must give these very bits."""
    got = MEAN.score(weighted([0.1, 0.9, 0.3, 0.8, 0.25, 0.6, 0.7]), seed=7)
    assert got == Score(0.5214285714285715, 0.3071428571428572, 0.7214285714285714, 7)
    assert not np.array_equal(intervals._draws(1, 0, 7), intervals._draws(2, 0, 7))


def test_draws_are_uniform():
    counts = np.bincount(np.concatenate([intervals._draws(3, slot, 10) for slot in range(10)]), minlength=10)
    expected = 10 * intervals.RESAMPLES / 10
    assert len(counts) == 10
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("n", [10, 40, 100])
def test_interval_covers_the_truth(n):
    """Exact coverage: an interval depends only on how many of the n rows are right, and that number is binomial.

    Promised are 95 %. Right and wrong rows make a lattice, so no method gives 95 % at every share; the percentile
    interval gives it on average over the shares and 86 % at its worst, where about three rows are wrong.
    """
    scores = [MEAN.score(weighted([1.0] * right + [0.0] * (n - right))) for right in range(n + 1)]
    low, high = np.array([s.low for s in scores]) - 1e-9, np.array([s.high for s in scores]) + 1e-9
    ways = np.array([math.comb(n, right) for right in range(n + 1)], dtype=float)
    rights = np.arange(n + 1)
    shares = np.arange(0.5, 1.0, 0.01)
    coverage = [(ways * p**rights * (1 - p) ** (n - rights))[(low <= p) & (p <= high)].sum() for p in shares]
    assert np.mean(coverage) >= 0.94
    assert np.min(coverage) >= 0.85


def test_loss_interval_covers_the_truth():
    """Rows of unequal length whose loss is correlated with their length: the ratio of sums is what must be covered."""
    draw = np.random.default_rng(5)
    tokens = draw.integers(1, 30, size=(300, 60)).astype(float)
    nll = tokens * (0.5 + 0.05 * tokens) * draw.gamma(4.0, 0.25, size=tokens.shape)
    lengths = np.arange(1, 30)
    truth = float((lengths * (0.5 + 0.05 * lengths)).sum() / lengths.sum())
    scores = [RATIO.score(weighted(nll[i], tokens[i]), seed=i) for i in range(300)]
    assert np.mean([s.low <= truth <= s.high for s in scores]) >= 0.90  # percentile at n = 60 runs about 1 % short


@pytest.mark.parametrize("n", [1, 20, 500])
def test_all_equal_rows_are_no_proof(n):
    wilson = n / (n + 1.959963984540054**2)
    right, wrong = MEAN.score(weighted([1.0] * n)), MEAN.score(weighted([0.0] * n))
    assert (right.score, right.low, right.high) == pytest.approx((1, wilson, 1))
    assert (wrong.score, wrong.low, wrong.high) == pytest.approx((0, 0, 1 - wilson))
    same = MEAN.difference(weighted([1.0] * n), weighted([1.0] * n))
    assert (same.score, same.low, same.high) == pytest.approx((0, wilson - 1, 1 - wilson))
    gained = MEAN.difference(weighted([1.0] * n), weighted([0.0] * n))
    assert (gained.score, gained.low, gained.high) == pytest.approx((1, 2 * wilson - 1, 1))


def test_pairing_makes_the_difference_sharper():
    before = [float(i % 2) for i in range(100)]
    after = [1.0 if i < 5 else x for i, x in enumerate(before)]
    paired = MEAN.difference(weighted(after), weighted(before))
    alone = MEAN.score(weighted(after))
    assert paired.score == pytest.approx(np.mean(after) - np.mean(before))
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


@given(shares, st.data())
def test_difference_turns_its_sign(before, data):
    after = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(before), max_size=len(before)))
    there, back = MEAN.difference(weighted(after), weighted(before)), MEAN.difference(weighted(before), weighted(after))
    assert (there.score, there.low, there.high) == pytest.approx((-back.score, -back.high, -back.low))


NLL = [2.0, 30.0, 4.5, 8.0]
TOKENS = [1, 10, 3, 8]


def test_loss_and_perplexity_weigh_tokens_not_rows():
    got = RATIO.score(weighted(NLL, TOKENS))
    assert got.score == pytest.approx(44.5 / 22)
    assert got.low < got.score < got.high
    assert got.low >= 1.0 and got.high <= 3.0  # never outside the rows' own losses
    perplexity = PERPLEXITY.score(weighted(NLL, TOKENS))
    assert [math.log(x) for x in (perplexity.score, perplexity.low, perplexity.high)] == pytest.approx(
        [got.score, got.low, got.high]
    )


def test_loss_differences_are_paired():
    better = [x - 0.5 * t for x, t in zip(NLL, TOKENS, strict=True)]  # half a nat less on every token
    got = RATIO.difference(weighted(better, TOKENS), weighted(NLL, TOKENS))
    assert got.score == pytest.approx(-0.5)
    assert (got.low, got.high) == (None, None)  # the same on every row: nothing to resample
    mixed = RATIO.difference(weighted([1.0, 29.0, 4.4, 8.1], TOKENS), weighted(NLL, TOKENS))
    assert mixed.low < mixed.score < mixed.high < 1
    ratio = PERPLEXITY.difference(weighted(better, TOKENS), weighted(NLL, TOKENS))
    assert ratio.score == pytest.approx(math.exp(44.5 / 22 - 0.5) - math.exp(44.5 / 22))
    assert ratio.low < ratio.score < ratio.high < 0


@pytest.mark.parametrize("summary", [RATIO, PERPLEXITY])
def test_one_row_has_no_loss_interval(summary):
    got = summary.score(weighted([3.0], [2]))
    assert (got.low, got.high, got.n) == (None, None, 1)
    assert PERPLEXITY.difference(weighted(NLL, TOKENS), weighted(NLL, TOKENS)) == Score(0.0, None, None, 4)
    assert PERPLEXITY.difference(weighted([3.0], [2]), weighted([4.0], [2])).low is None


def test_perplexity_stays_a_number():
    assert math.isfinite(PERPLEXITY.score(weighted([9000.0, 1.0], [1, 1])).high)


@pytest.mark.parametrize(
    "call",
    [
        lambda: MEAN.score(weighted([])),
        lambda: MEAN.difference(weighted([]), weighted([])),
        lambda: RATIO.score(weighted([], [])),
        lambda: RATIO.difference(weighted([], []), weighted([], [])),
        lambda: PERPLEXITY.score(weighted([], [])),
        lambda: PERPLEXITY.difference(weighted([], []), weighted([], [])),
    ],
)
def test_no_rows_is_an_error(call):
    with pytest.raises(DataError, match="no rows to score"):
        call()


def test_unpaired_lengths_are_our_mistake():
    with pytest.raises(AssertionError, match="differ in length: 3 and 2"):
        MEAN.difference(weighted([1.0, 0.0, 1.0]), weighted([1.0, 0.0]))


def test_json():
    assert RATIO.score(weighted([3.0], [2])).to_json() == {"score": 1.5, "low": None, "high": None, "n": 1}
