"""The merge benchmark: every method has its row, and the error of each system is measured against the best."""

from __future__ import annotations

import sys

import pytest

from benchmarks import merge, merge_table
from benchmarks.merge_adapters import RANK, adapters
from veneer.merge.table import MERGES


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")
def test_every_method_has_a_row() -> None:
    methods = ["svd", "ties", "cat"]
    found = dict(merge_table.rows(methods, layers=2, shapes={"mlp.up_proj": (96, 160)}))
    assert list(found) == methods and set(methods) <= set(MERGES)
    assert {method: row["rank"] for method, row in found.items()} == {"svd": RANK, "ties": RANK, "cat": 128}
    # So small a merge may fit in what the process holds already: nothing beyond the adapters.
    assert all(row["seconds"] > 0 and row["memory"] >= 1 for row in found.values())
    assert found["cat"]["kept"] == 1.0 > found["svd"]["kept"] > 0.5
    assert all(len(merge_table.line(*row)) >= len(merge_table.COLUMNS) for row in found.items())


def test_our_error_is_that_of_the_exact_way() -> None:
    updates = adapters(80, 60, seed=0)
    products = {"veneer": merge.ours(updates), "svd_lowrank": merge.dense_lowrank(updates)}
    found = merge.errors(updates, products)
    assert found["veneer"] < 1e-6 < found["svd_lowrank"]
