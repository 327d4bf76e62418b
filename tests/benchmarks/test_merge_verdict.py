"""The verdict's judge: it finds what foretells, finds nothing in noise, and never sees a task that it judges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks import merge_verdict
from benchmarks.merge_verdict import (
    Pairs,
    auc,
    by_price,
    calibration,
    fitted,
    judged,
    learned_less_served,
    prices_table,
    read,
    ridge,
    table,
)


def _logit(share: np.ndarray) -> np.ndarray:
    return np.log(share / (1 - share))


def _pairs(seed: int = 0, tasks: int = 18) -> Pairs:
    """Every task is mergeable or not; `rows` sees that through a little noise, `cosine` is noise."""
    draw = np.random.default_rng(seed)
    soft = draw.uniform(0.3, 0.99, tasks)
    pairs = list(itertools.combinations(range(tasks), 2))
    share = np.array([min(soft[i], soft[j]) for i, j in pairs])
    worth = np.stack([share, *(np.full(len(pairs), worth) for worth in (0.5, 0.6, 0.55))], axis=1)
    columns = {
        "cosine": draw.normal(size=(len(pairs), 1)),
        "rows": (_logit(share) + draw.normal(scale=0.1, size=len(pairs)))[:, None],
    }
    return Pairs([(f"t{i}", f"t{j}") for i, j in pairs], worth, columns)


def test_what_foretells_wins_and_noise_does_not() -> None:
    found = judged(_pairs())["predictors"]
    assert found["rows"]["auc"] > 0.95 and found["rows"]["lost"] < 0.01
    assert 0.35 < found["cosine"]["auc"] < 0.65
    assert found["rows"]["lost"] < min(
        found[name]["lost"] for name in ("cosine", "merge", "learn", "route", "retrain", "usual")
    )
    assert found["rows"]["calibration_error"] < 0.05
    assert found["rows"]["concordance"] > 0.95 and found["rows"]["squared_error"] < 0.1
    assert 0.4 < found["cosine"]["concordance"] < 0.6 and found["cosine"]["squared_error"] > 0.95
    assert found["merge"]["chosen"] == {"merge": 1.0, "learn": 0.0, "route": 0.0, "retrain": 0.0}
    lines = table(judged(_pairs()))
    assert lines[1].split()[0] == "rows" and lines[-1] == "half: not measured" and len(lines) == 9


def test_a_task_that_is_judged_was_not_fitted_on() -> None:
    """A column that names the task tells nothing of tasks that were never seen."""
    pairs = _pairs()
    named = np.array([[float(task == f"t{i}") for i in range(18)] for pair in pairs.tasks for task in pair])
    pairs.columns["named"] = named.reshape(len(pairs.tasks), 2, 18).sum(1)
    found = judged(pairs)["predictors"]["named"]
    assert found["auc"] == pytest.approx(0.5, abs=0.02)  # ties, up to rounding


def test_ridge_is_least_squares_where_there_is_much() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(4000, 3))
    y = x @ [1.0, -2.0, 0.5] + 3
    new = draw.normal(size=(5, 3))
    np.testing.assert_allclose(ridge(x, y, new), new @ [1.0, -2.0, 0.5] + 3, atol=5e-3)


def test_auc_and_calibration() -> None:
    told = np.array([0.9, 0.8, 0.3, 0.3])
    assert auc(told, np.array([True, True, False, False])) == 1
    assert auc(told, np.array([False, False, True, True])) == 0
    assert np.isnan(auc(told, np.ones(4, dtype=bool)))
    assert calibration(told, told) == 0
    assert calibration(told, told + 0.25) == pytest.approx(0.25)


def test_what_was_measured_is_read() -> None:
    def scores(score: float, loss: float) -> dict:
        return {"score": score, "loss": loss, "held": {"score": score, "loss": loss}}

    held = {
        "base": {"a": scores(0.0, 3.0), "b": scores(0.5, 2.0)},
        "alone": {"a": {"a": scores(1.0, 1.0)}, "b": {"b": scores(1.0, 1.0)}},
        "half": {"a": {"a": scores(0.5, 2.0)}, "b": {"b": scores(1.0, 1.0)}},
        "features": {"a--b": {"first": 0, "second": 1, "layers": 3, "cosine": 0.1, "input": 0.7}},
        "pairs": {
            "a--b": {
                "linear 1/2": {"a": scores(0.9, 1.2), "b": scores(0.6, 1.5), "kept": 1.0},
                "lora_soups": {"a": scores(0.3, 1.2), "b": scores(0.9, 1.5), "kept": 1.0},
            },
            "b--c": {},
        },
    }
    pairs = read(held)
    assert pairs.tasks == [("a", "b")]
    np.testing.assert_allclose(pairs.worth, [[0.2, 0.3, 1 - merge_verdict.ROUTE, np.nan]])
    assert pairs.columns["cosine"].tolist() == [[0.1]] and pairs.columns["weights"].tolist() == [[0.1, 0.7]]
    np.testing.assert_allclose(pairs.columns["rows"], [[np.log(1.1 - 0.5)]])
    np.testing.assert_allclose(pairs.columns["half"], [[np.log(1.1 - 0.5)]])


def test_a_choice_that_nobody_tried_is_left_out() -> None:
    pairs = _pairs()
    pairs.worth[:, merge_verdict.RETRAINED] = np.nan
    found = judged(pairs)
    assert "retrain" not in found["predictors"] and found["tried"]["retrain"] == 0
    assert found["predictors"]["rows"]["lost"] < 0.01


def test_what_is_lost_is_told_of_pairs_for_which_all_was_tried() -> None:
    pairs, other = _pairs(), _pairs()
    whole = np.arange(len(pairs.tasks)) % 3 == 0
    pairs.worth[~whole, merge_verdict.RETRAINED] = np.nan
    other.worth[whole, merge_verdict.RETRAINED] = 5.0
    other.worth[~whole, merge_verdict.RETRAINED] = np.nan
    found, best = judged(pairs)["predictors"], judged(other)["predictors"]
    assert found["rows"]["lost"] < 0.01 and best["retrain"]["lost"] == 0
    assert found["rows"]["concordance"] == judged(_pairs())["predictors"]["rows"]["concordance"]


def test_prices_change_the_best_choice_and_nothing_else() -> None:
    pairs = _pairs()
    pairs.worth[:, 1:] = 0.1, 1 - merge_verdict.ROUTE, 1 - merge_verdict.RETRAIN
    told = by_price(pairs)
    assert told[f"{100 * merge_verdict.ROUTE:.0f}"] == {
        n: one["lost"] for n, one in judged(pairs)["predictors"].items()
    }
    cheap, dear = (told[price] for price in ("10", "50"))
    assert cheap["route"] < dear["route"] and cheap["merge"] > dear["merge"]
    assert cheap["retrain"] - cheap["route"] == pytest.approx(merge_verdict.RETRAIN - merge_verdict.ROUTE, abs=1e-3)
    assert all(one["rows"] < min(one["merge"], one["route"]) for one in told.values())
    assert prices_table(told)[2].split()[0] == "10"


def test_the_curve_through_all_pairs() -> None:
    pairs = _pairs()
    pairs.columns["rows"] = _logit(pairs.worth[:, :1]) * 0.5 + 0.25
    told = fitted(pairs)
    assert told["constant"] == pytest.approx(-0.5, abs=0.01) and told["slope"] == pytest.approx(2.0, abs=0.01)
    tops, *ends = zip(*told["off"], strict=True)
    assert list(tops) == sorted(tops) and tops[-1] == 1.0
    np.testing.assert_allclose(ends, 0, atol=0.01)


def test_a_choice_tried_on_no_pair_of_a_fit_is_never_chosen() -> None:
    """Of it nothing is known there, however good it is."""
    pairs = _pairs()
    some = np.array(["t0" in pair or "t1" in pair for pair in pairs.tasks])
    pairs.worth[:, merge_verdict.LEARN] = np.where(some, 0.1, np.nan)
    told = judged(pairs)["predictors"]["rows"]["chosen"]
    assert told["learn"] == 0


def test_the_usual_choice_never_looks() -> None:
    """Routing is best in the mean over all pairs, so it is what whoever never looks would do."""
    pairs = _pairs()
    pairs.worth[:, merge_verdict.SERVED] = 0.75
    found = judged(pairs)["predictors"]
    assert found["usual"] == found["route"] and found["usual"]["chosen"]["route"] == 1
    assert found["rows"]["lost"] < found["usual"]["lost"]


def test_learned_weights_beside_serving_both() -> None:
    pairs = _pairs()
    pairs.worth[:, merge_verdict.LEARN] = np.nan
    assert learned_less_served(pairs) == {}
    pairs.worth[:3, merge_verdict.LEARN] = 0.7
    found = learned_less_served(pairs)
    assert found["20"] == pytest.approx({"score": -0.1, "low": -0.1, "high": -0.1})
    assert found["50"]["low"] == pytest.approx(0.2)


def test_concordance() -> None:
    assert merge_verdict.concordance(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.2])) == (2.0, 2)
    assert merge_verdict.concordance(np.array([1.0, 1.0]), np.array([0.1, 0.2])) == (0.5, 1)
