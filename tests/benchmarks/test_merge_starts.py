"""What starts keep is told pair by pair, beside the first start, and what was foretold beside what was kept."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.merge_starts import summary
from veneer.evaluate.foretold import foretell


def scores(score: float, loss: float) -> dict[str, Any]:
    return {"score": score, "loss": loss, "held": {"score": score, "loss": loss}}


def made(kept_a: float, kept_b: float, loss_kept: float) -> dict[str, Any]:
    """A pair whose adapters alone gain from 0 to 0.8 in score and from 3 to 1 in loss."""
    merged = {"a": scores(0.8 * kept_a, 3 - 2 * loss_kept), "b": scores(0.8 * kept_b, 1.0)}
    alone = {"first": {"a": scores(0.8, 1.0)}, "second": {"b": scores(0.8, 1.0)}}
    return {**alone, "linear 1/2": merged, "linear 1": merged}


BASE = {"a": scores(0.0, 3.0), "b": scores(0.0, 3.0), "c": scores(0.0, 3.0)}


def test_the_worse_task_counts_and_starts_are_compared_pair_by_pair() -> None:
    """Only pairs that have every start there is."""
    pairs = {"a--b": {"shared": made(0.5, 0.9, 0.8), "other": made(0.7, 0.6, 0.5)}, "b--c": {"shared": {}}}
    found = summary({"base": BASE, "pairs": pairs})
    assert found["shared"]["linear_1/2"]["kept"] == 0.5 and found["other"]["linear_1"]["kept"] == 0.6
    assert found["other"]["linear_1"]["less_shared"]["score"] == pytest.approx(0.1)
    assert found["other"]["linear_1"]["pairs"] == 1 and "data" not in found


def test_what_was_foretold_is_held_against_what_was_kept() -> None:
    near, far = foretell(0, 1, 0.9).share, foretell(0, 1, 0.6).low - 0.1
    right, wrong = made(near, 1.0, 0.9), made(far, 1.0, 0.6)
    pairs = {"a--b": {"shared": right}, "b--a": {"shared": swapped(wrong)}}
    told = summary({"base": BASE, "pairs": pairs})["shared"]["foretold"]
    assert told == {"correlation": 1.0, "within": 0.5}


def swapped(found: dict[str, Any]) -> dict[str, Any]:
    """The same with b first."""
    return {**found, "first": {"b": scores(0.8, 1.0)}, "second": {"a": scores(0.8, 1.0)}}
