"""Several data sets in shares: every row at least once, counts in proportion, the same for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.mixture import epoch, shares

SETS = st.lists(st.tuples(st.integers(1, 40), st.floats(0.05, 20)), min_size=1, max_size=4)


@given(sets=SETS, seed=st.integers(0, 99))
def test_an_epoch_has_every_row_and_the_shares_asked_for(sets, seed):
    sizes, weights = zip(*sets, strict=True)
    found = epoch(sizes, weights, seed)
    assert found == epoch(sizes, weights, seed)
    for size, rows in zip(sizes, found, strict=True):
        counts = Counter(rows)
        assert set(counts) == set(range(size))
        assert max(counts.values()) - min(counts.values()) <= 1  # no row is favoured by more than one
    total, longest = sum(map(len, found)), max(size / weight for size, weight in sets)
    for rows, weight, share in zip(found, weights, shares(weights), strict=True):
        assert abs(len(rows) - weight * longest) <= 0.5 + 1e-6
        assert abs(len(rows) - share * total) <= len(sets)


def test_by_hand():
    assert [len(rows) for rows in epoch([100, 10], [0.5, 0.5], 0)] == [100, 100]
    assert [len(rows) for rows in epoch([100, 10], [100, 10], 0)] == [100, 10]
    assert [len(rows) for rows in epoch([100, 30], [0.8, 0.2], 0)] == [120, 30]
    assert epoch([100, 30], [0.8, 0.2], 0)[0][:100] == list(range(100))
    assert epoch([100, 30], [0.8, 0.2], 0) != epoch([100, 30], [0.8, 0.2], 1)
    assert shares([3, 1]) == pytest.approx([0.75, 0.25])
