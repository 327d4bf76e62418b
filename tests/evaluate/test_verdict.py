"""Merge or serve both: the line is the benchmark's, and every pair with a sure gain on both sides gets a verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.adapter.conftest import adapter_for  # noqa: F401
from tests.evaluate.pico_reader import pico_reader
from veneer.evaluate import verdict
from veneer.evaluate.inspection_page import write_inspection
from veneer.evaluate.on_data import OnFile, on_data
from veneer.evaluate.verdict import ENOUGH, MERGE, SERVE_BOTH, foretell, verdicts
from veneer.measure.inspection import inspect

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "merge_verdict.json"
NAMES = ["one", "two", "three"]


def test_the_line_is_the_one_that_was_fitted() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert found["fit"] == {"constant": verdict.CONSTANT, "slope": verdict.SLOPE, "off": list(verdict.OFF)}
    assert pytest.approx(1 - ENOUGH) == found["prices"]["route"]


def test_the_verdict_is_given_because_it_wins() -> None:
    """At every price that was looked at: a verdict that loses more than never looking has no place in `inspect`."""
    for lost in json.loads(RESULT.read_text(encoding="utf-8"))["lost_by_price"].values():
        assert lost["rows"] < min(lost["merge"], lost["route"], lost["retrain"], lost["cosine"])


@given(st.floats(-5, 2), st.floats(-5, 2))
def test_what_keeps_more_is_told_more(one: float, other: float) -> None:
    low, high = (foretell(0, 1, kept) for kept in sorted((one, other)))
    assert low.kept <= high.kept and low.low <= high.low and low.high <= high.high
    for told in (low, high):
        assert 0 <= told.low <= told.kept <= told.high <= 1
        assert told.verdict == (MERGE if told.kept >= ENOUGH else SERVE_BOTH)


def test_a_merge_that_keeps_all_is_advised_and_one_that_keeps_half_is_not() -> None:
    assert foretell(0, 1, 1.0).verdict == MERGE
    assert foretell(0, 1, 0.5).verdict == SERVE_BOTH


@pytest.fixture
def found(adapter_for: Any) -> tuple[OnFile, ...]:  # noqa: F811
    loaded = pico_reader()
    adapters = [adapter_for(loaded.model, 2, seed) for seed in range(3)]
    rows = [[{"prompt": f"{n} + {k}", "completion": str(n + k)} for n in range(8)] for k in (1, 2, 3)]
    return on_data(loaded, adapters, NAMES, NAMES, rows)


def keeping(found: tuple[OnFile, ...], kept: dict[tuple[int, int], float | None]) -> tuple[OnFile, ...]:
    return tuple(
        replace(one, beside=tuple(replace(each, kept=kept[one.adapter, each.other]) for each in one.beside))
        for one in found
    )


def test_pairs_of_which_both_gain_are_told_by_the_worse_one(found: tuple[OnFile, ...]) -> None:
    kept = {(0, 1): 0.99, (1, 0): 0.7, (0, 2): 0.9, (2, 0): None, (1, 2): 0.8, (2, 1): -0.2}
    told = verdicts(keeping(found, kept))
    assert told == (foretell(0, 1, 0.7), foretell(1, 2, -0.2))
    assert told[0].to_json(NAMES) | {"first": "one", "second": "two"} == told[0].to_json(NAMES)
    assert verdicts(keeping(found, dict.fromkeys(kept))) == ()


def test_the_page_has_the_verdict(found: tuple[OnFile, ...], adapter_for: Any, tmp_path: Path) -> None:  # noqa: F811
    for n in range(3):
        adapter_for(pico_reader().model, 2, n).save(tmp_path / NAMES[n])
    inspection = inspect([str(tmp_path / name) for name in NAMES])
    sure = keeping(found, dict.fromkeys([(i, j) for i in range(3) for j in range(3)], 0.97))
    write_inspection(str(tmp_path / "with.html"), inspection, sure)
    assert "merge, or serve both?" in (tmp_path / "with.html").read_text(encoding="utf-8")
    none = keeping(found, dict.fromkeys([(i, j) for i in range(3) for j in range(3)]))
    write_inspection(str(tmp_path / "without.html"), inspection, none)
    assert "serve both" not in (tmp_path / "without.html").read_text(encoding="utf-8")
