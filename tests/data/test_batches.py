"""The order of rows: every row once an epoch, a pure function of seed and step, the same on every platform."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.batches import Batches, split
from veneer.errors import DataError

SHAPES = st.tuples(st.integers(1, 60), st.integers(1, 70), st.integers(-(2**70), 2**70))


@given(shape=SHAPES, epoch=st.integers(0, 1000))
def test_an_epoch_has_every_row_once(shape, epoch):
    batches = Batches(*shape)
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    chunks = [batches.rows(step) for step in steps]
    assert sorted(row for chunk in chunks for row in chunk) == list(range(batches.n_rows))
    assert all(len(chunk) == batches.batch_size for chunk in chunks[:-1])
    assert 1 <= len(chunks[-1]) <= batches.batch_size


@given(shape=SHAPES, steps=st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_a_step_needs_no_history(shape, steps):
    forward = {step: Batches(*shape).rows(step) for step in steps}
    assert {step: Batches(*shape).rows(step) for step in reversed(steps)} == forward


def test_the_order_is_fixed_for_ever():
    # a change of these numbers breaks the resuming of every older run
    assert Batches(10, 4, seed=0).rows(0) == [7, 2, 4, 0]
    assert [Batches(10, 4, seed=0).rows(step) for step in (3, 4, 5)] == [[5, 9, 7, 8], [1, 6, 4, 3], [2, 0]]
    assert split(10, 3, seed=0)[1] == [1, 6, 8]


def test_epochs_and_seeds_differ():
    batches = Batches(50, 50, seed=1)
    assert batches.rows(0) != batches.rows(1)
    assert batches.rows(0) != Batches(50, 50, seed=2).rows(0)


def test_all_orders_are_about_equally_likely():
    orders = Counter(tuple(Batches(3, 3, seed).rows(epoch)) for seed in range(60) for epoch in range(20))
    # 1,200 draws of 6 orders: mean 200, standard deviation 12.9; five of them allowed
    assert len(orders) == 6
    assert all(135 < count < 265 for count in orders.values())


def test_a_batchs_rows_may_be_changed_by_their_taker():
    batches = Batches(5, 2, seed=0)
    batches.rows(0).clear()
    assert len(batches.rows(0)) == 2


@pytest.mark.parametrize(("n_rows", "batch_size"), [(0, 4), (4, 0), (-1, 1)])
def test_nothing_to_batch_is_refused(n_rows, batch_size):
    with pytest.raises(DataError, match=f"{n_rows} rows in batches of {batch_size}"):
        Batches(n_rows, batch_size, seed=0)


def test_a_negative_step_is_our_own_mistake():
    with pytest.raises(ValueError, match="step is -1"):
        Batches(4, 2, seed=0).rows(-1)


@given(n=st.integers(1, 200), part=st.floats(0, 0.999) | st.integers(0, 199), seed=st.integers())
def test_a_split_has_every_row_on_one_side(n, part, seed):
    try:
        train, validation = split(n, part, seed)
    except DataError:
        assert part >= n if isinstance(part, int) else max(1, round(n * part)) >= n
        return
    assert sorted(train + validation) == list(range(n))
    assert train == sorted(train)
    assert validation == sorted(validation)
    assert len(validation) == (part if isinstance(part, int) else max(1, round(n * part)) if part else 0)


@given(groups=st.lists(st.integers(0, 9), min_size=2, max_size=60), part=st.floats(0.01, 0.9), seed=st.integers())
def test_a_group_stays_on_one_side(groups, part, seed):
    try:
        train, validation = split(len(groups), part, seed, groups)
    except DataError:
        return
    assert not {groups[row] for row in train} & {groups[row] for row in validation}
    assert train
    assert len(validation) >= max(1, round(len(groups) * part))


def test_one_group_cannot_be_split():
    with pytest.raises(DataError, match="leaves nothing to train on"):
        split(5, 0.2, 0, ["same prompt"] * 5)


def test_the_split_does_not_follow_the_batches():
    # with one permutation for both, validation would be the first rows that training draws
    assert split(100, 10, 3)[1] != sorted(Batches(100, 10, 3).rows(0))


@pytest.mark.parametrize("part", [1.0, 1.5, -0.1, float("nan"), 10, 11, -1])
def test_impossible_splits_are_refused(part):
    with pytest.raises(DataError, match="validation_split is"):
        split(10, part, 0)
