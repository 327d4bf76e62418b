"""What a merge would keep: the curve is the benchmark's, every pair is told of or it is said why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluate.pico_reader import pico_reader
from veneer.adapter.attach import attach, detach
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.evaluate import foretold as module
from veneer.evaluate.foretold import FEWEST, foretell, foretold, gain_kept
from veneer.evaluate.inspection_page import write_inspection
from veneer.evaluate.on_data import OnFile, on_data
from veneer.measure.inspection import inspect

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "merge_verdict.json"
NAMES = ["one", "two", "three"]
PLACES = [(i, j) for i in range(3) for j in range(3)]


def test_the_curve_is_the_one_that_was_fitted() -> None:
    fit = json.loads(RESULT.read_text(encoding="utf-8"))["fit"]
    assert fit == {"constant": module.CONSTANT, "slope": module.SLOPE, "off": [list(each) for each in module.OFF]}


def test_by_hand() -> None:
    assert gain_kept(3.0, 1.0, 2.5) == 0.25 and gain_kept(3.0, 1.0, 4.0) == -0.5
    told = foretell(0, 1, 0.9)  # 1 / (1 + exp(2.862 + 2.087 log(0.2)))
    assert (told.share, told.low, told.high) == pytest.approx((0.6217, 0.3817, 0.7917), abs=1e-4)
    assert told.cells(NAMES) == ["one : two", "62%", "38% to 79%"]


@given(st.floats(-5, 2), st.floats(-5, 2))
def test_what_keeps_more_of_the_loss_is_told_more(one: float, other: float) -> None:
    less, more = (foretell(0, 1, kept) for kept in sorted((one, other)))
    assert less.share <= more.share
    assert all(told.low < told.share < told.high <= 1 for told in (less, more))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return pico_reader()


@pytest.fixture(scope="module")
def adapters(loaded: Any) -> list[Adapter]:
    made = []
    for seed in range(3):
        attach(loaded.model, LoraSettings(r=2), "made", seed=seed)
        made.append(take(loaded.model, "made", base_name="pico"))
        detach(loaded.model, "made")
    return made


@pytest.fixture(scope="module")
def found(loaded: Any, adapters: list[Adapter]) -> tuple[OnFile, ...]:
    rows = [[{"prompt": f"{n} + {k}", "completion": str(n + k)} for n in range(8)] for k in (1, 2, 3)]
    return on_data(loaded, adapters, NAMES, NAMES, rows)


def keeping(
    found: tuple[OnFile, ...], kept: dict[tuple[int, int], float | None], rows: int = FEWEST
) -> tuple[OnFile, ...]:
    """As if that had been measured, on so many rows."""
    return tuple(
        replace(one, rows=rows, beside=tuple(replace(each, kept=kept[one.adapter, each.other]) for each in one.beside))
        for one in found
    )


def test_pairs_of_which_both_gain_are_told_by_the_worse_one(found: tuple[OnFile, ...]) -> None:
    kept = {(0, 1): 0.99, (1, 0): 0.7, (0, 2): 0.9, (2, 0): None, (1, 2): 0.8, (2, 1): -0.2}
    told, [why] = foretold(keeping(found, kept), NAMES)
    assert told == (foretell(0, 1, 0.7), foretell(1, 2, -0.2))
    assert why.startswith("one : three:") and "three does not surely gain" in why
    assert list(told[0].to_json(NAMES).values()) == ["one", "two", told[0].share, told[0].low, told[0].high]


def test_few_rows_foretell_nothing_and_it_is_said(found: tuple[OnFile, ...]) -> None:
    told, silent = foretold(keeping(found, dict.fromkeys(PLACES, 0.9), FEWEST - 1), NAMES)
    assert told == () and len(silent) == 3
    assert silent[0].endswith("from fewer than 20 rows; one has 19 and two has 19")


def test_the_page_has_it(found: tuple[OnFile, ...], adapters: list[Adapter], tmp_path: Path) -> None:
    for name, adapter in zip(NAMES, adapters, strict=True):
        adapter.save(tmp_path / name)
    inspection = inspect([str(tmp_path / name) for name in NAMES])
    write_inspection(str(tmp_path / "with.html"), inspection, keeping(found, dict.fromkeys(PLACES, 0.9)))
    assert "38% to 79%" in (tmp_path / "with.html").read_text(encoding="utf-8")
    write_inspection(str(tmp_path / "without.html"), inspection, keeping(found, dict.fromkeys(PLACES)))
    assert "four of five" not in (tmp_path / "without.html").read_text(encoding="utf-8")
