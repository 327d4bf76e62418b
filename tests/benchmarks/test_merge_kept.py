"""What a task keeps of its gain: the worse counts, over the pairs that all ways made, of tasks that have a gain."""

from __future__ import annotations

from typing import Any

from benchmarks.merge_kept import by_method, finished, gaining, methods_table, over_tasks, worse, worse_loss


def scores(score: float, loss: float) -> dict[str, Any]:
    return {"score": score, "loss": loss, "held": {"score": score, "loss": loss}}


BASE = {"a": scores(0.0, 3.0), "b": scores(0.5, 2.0), "c": scores(0.0, 3.0)}
ALONE = {"a": {"a": scores(1.0, 1.0)}, "b": {"b": scores(1.0, 1.0)}, "c": {"c": scores(1.0, 1.0)}}


def made(kept_a: float, kept_b: float) -> dict[str, Any]:
    return {"a": scores(kept_a, 1.2), "b": scores(0.5 + 0.5 * kept_b, 1.5), "kept": 1.0}


def held(pairs: dict[str, Any]) -> dict[str, Any]:
    return {"base": BASE, "alone": ALONE, "pairs": pairs}


def test_the_worse_of_two_counts() -> None:
    own = {"a": ALONE["a"]["a"], "b": ALONE["b"]["b"]}
    assert worse(BASE, own, made(0.25, 0.75)) == 0.25
    assert worse(BASE, own, made(2.0, 1.5)) == 1.0
    assert worse_loss(BASE, own, made(0.25, 0.75)) == 0.5


def test_each_way_beside_the_plain_mean() -> None:
    found = by_method(held({"a--b": {"linear 1/2": made(0.5, 0.25), "svd on rows": made(0.5, 0.75)}}))
    one = {"pairs": 1, "good": 0.0}
    assert found == {
        "linear_1/2": {**one, "kept": 0.25, "median": 0.25, "less_linear": {"score": 0.0, "low": 0.0, "high": 0.0}},
        "svd_on_rows": {**one, "kept": 0.5, "median": 0.5, "less_linear": {"score": 0.25, "low": 0.25, "high": 0.25}},
    }
    assert methods_table(found)[1].split()[:5] == ["svd_on_rows", "1", "50.0%", "50.0%", "0.0%"]


def test_a_way_that_is_not_finished_is_left_out() -> None:
    """linear is on all pairs, ties on the two that were drawn, svd on one of those so far."""
    plain, kept = {"linear 1/2": made(0.5, 0.5)}, made(0.75, 1.0)
    pairs = {"a--b": {**plain, "ties 1": kept, "svd 1": kept}, "b--a": {**plain, "ties 1": kept}, "a--c": plain}
    assert finished(pairs) == ["linear 1/2", "ties 1"]
    found = by_method(held(pairs))
    assert {name: one["pairs"] for name, one in found.items()} == {"linear_1/2": 2, "ties_1": 2}
    assert by_method(held({})) == {} == by_method(held({"a--b": {"svd 1": kept}}))


def test_an_interval_is_of_draws_that_hold_a_pair() -> None:
    assert over_tasks({"a--b": 0.3}) == {"score": 0.3, "low": 0.3, "high": 0.3}


def test_pairs_of_a_task_that_has_nothing_to_keep_are_left_out() -> None:
    given = {
        "base": {"a": {"score": 0.0}, "b": {"score": 0.5}, "c": {"score": 0.01}},
        "alone": {"a": {"a": {"score": 0.9}}, "b": {"b": {"score": 0.7}}, "c": {"c": {"score": 0.04}}},
        "pairs": {"a--b": {}, "a--c": {}, "b--c": {}},
    }
    assert list(gaining(given)["pairs"]) == ["a--b"]
