"""Every adapter has a name of its own in the tables, and one that an adapter can have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.adapter.attach import is_name
from veneer.evaluate.labels import labels_of


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["out/a", "out/b c"], ["a", "b_c"]),
        (["x/a", "y/a", "a_1"], ["a_1", "a_2", "a_1_3"]),
        (["merged", "b"], ["merged_1", "b_2"]),
        (["base", "keys"], ["base_1", "keys_2"]),
    ],
)
def test_by_hand(folders: list[str], labels: list[str]) -> None:
    assert labels_of(folders, {"merged"}) == labels


@given(st.lists(st.text("ab1_ .ü", max_size=60), min_size=1, max_size=12))
def test_no_two_are_equal_and_all_can_be_attached(folders: list[str]) -> None:
    labels = labels_of(folders, {"a"})
    assert len(set(labels)) == len(folders) and all(map(is_name, labels)) and "a" not in labels
