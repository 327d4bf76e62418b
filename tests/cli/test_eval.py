"""`veneer eval` around a stand-in for the evaluation."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from veneer.config import EvalSettings


def score(value: float) -> dict[str, float | int]:
    return {"score": value, "low": value - 0.05, "high": value + 0.05, "n": 200}


ONE = {"exact_match": {"base": score(0.1), "adapter": score(0.9), "difference": score(0.8)}}
TWO = {
    "exact_match": {
        "base": score(0.1),
        "a": score(0.5),
        "b": score(0.7),
        "differences": {"a": score(0.4), "b": score(0.6)},
    }
}


@pytest.fixture
def evaluation(stub: Any, model: Any) -> SimpleNamespace:
    seen = SimpleNamespace(settings=None, metrics=ONE)

    def evaluate_files(settings: EvalSettings) -> Any:
        seen.settings = settings
        return SimpleNamespace(to_json=lambda: {"metrics": seen.metrics, "rows": 200, "notes": ["a note"]})

    stub("veneer.evaluate.verb", evaluate_files=evaluate_files)
    return seen


def test_json_is_the_result(veneer: Any, evaluation: SimpleNamespace) -> None:
    answer = veneer("eval", "--adapter", "out/a", "--dataset", "t.jsonl", "--metrics", "exact_match", "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["metrics"]["exact_match"]["adapter"]["score"] == 0.9
    assert evaluation.settings.metrics == ["exact_match"]
    assert "note: a note" in answer.err


def test_the_base_is_the_one_the_adapter_names(veneer: Any, evaluation: SimpleNamespace) -> None:
    answer = veneer("eval", "out/a", "--dataset", "t.jsonl")
    assert evaluation.settings.base_model == "smollm2"
    assert "base model: smollm2" in answer.err
    veneer("eval", "out/a", "--dataset", "t.jsonl", "--model", "other")
    assert evaluation.settings.base_model == "other"


def test_no_name_no_base(veneer: Any, evaluation: SimpleNamespace) -> None:
    answer = veneer("eval", "out/nameless", "--dataset", "t.jsonl")
    assert (answer.code, evaluation.settings) == (2, None)
    assert "out/nameless names none; give --base-model" in answer.err
    assert "out/a names smollm2, out/nameless names none" in veneer("eval", "out/a,out/nameless", "--dataset", "t").err


@pytest.mark.parametrize("metrics", [ONE, TWO])
def test_the_table_has_a_line_for_every_score(veneer: Any, evaluation: SimpleNamespace, metrics: Any) -> None:
    evaluation.metrics = metrics
    lines = [line.split() for line in veneer("eval", "out/a", "--dataset", "t.jsonl").out.splitlines()]
    if metrics is ONE:
        assert ["exact_match", "difference", "0.8", "0.75", "0.85", "200"] in lines
    else:
        assert ["exact_match", "differences", "b", "0.6", "0.55", "0.65", "200"] in lines
