"""`veneer eval` around a stand-in for the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
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
    lines = [" ".join(line.split()) for line in veneer("eval", "out/a", "--dataset", "t.jsonl").out.splitlines()]
    assert "base 0.100 [0.050, 0.150] 200" in lines
    if metrics is ONE:
        assert "adapter 0.900 [0.850, 0.950] +0.800 [+0.750, +0.850] 200" in lines
    else:
        assert "a 0.500 [0.450, 0.550] +0.400 [+0.350, +0.450] 200" in lines
        assert "b 0.700 [0.650, 0.750] +0.600 [+0.550, +0.650] 200" in lines


def test_the_base_alone_is_a_line_a_metric(veneer: Any, evaluation: SimpleNamespace) -> None:
    evaluation.metrics = {"loss": {"base": {"score": 2.5, "low": None, "high": None, "n": 1}}}
    lines = [" ".join(line.split()) for line in veneer("eval", "out/a", "--dataset", "t.jsonl").out.splitlines()]
    assert "loss 2.500 1" in lines


def test_output_is_json_or_markdown_by_its_name(veneer: Any, evaluation: SimpleNamespace, tmp_path: Path) -> None:
    evaluation.metrics = TWO
    veneer("eval", "out/a", "--dataset", "t.jsonl", "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == TWO
    veneer("eval", "out/a", "--dataset", "t.jsonl", "--output", tmp_path / "r.md")
    table = (tmp_path / "r.md").read_text()
    assert "| metric | model | score | 95 % interval | less base | 95 % interval | rows |" in table
    assert "| exact_match | b | 0.700 | [0.650, 0.750] | +0.600 | [+0.550, +0.650] | 200 |" in table
    assert "- a note" in table


@pytest.mark.parametrize(
    "words, told",
    [
        ((), "give either `dataset` or `harness`"),
        (("--dataset", "t.jsonl", "--harness", "arc_easy"), "give either `dataset` or `harness`"),
        (("--harness", "arc_easy", "--metrics", "loss"), "tasks of `harness` say for themselves what metrics is"),
        (("--dataset", "t.jsonl", "--num-fewshot", "2"), "num_fewshot is for `harness` only"),
        (("--harness", "arc_easy", "--system-prompt", "a"), "`system_prompt` needs `apply_chat_template`"),
    ],
)
def test_options_of_data_and_of_tasks_do_not_mix(
    veneer: Any, evaluation: SimpleNamespace, words: Any, told: str
) -> None:
    answer = veneer("eval", "out/a", *words)
    assert (answer.code, evaluation.settings) == (2, None)
    assert told.replace("`", "") in answer.err.replace("`", "").replace("--", "").replace("-", "_")


def test_a_place_for_the_result_that_cannot_be_is_told_before_the_evaluation(
    veneer: Any, evaluation: SimpleNamespace, tmp_path: Path
) -> None:
    answer = veneer("eval", "out/a", "--dataset", "t.jsonl", "--output", tmp_path)
    assert (answer.code, evaluation.settings) == (2, None)
    assert f"--output {tmp_path} is a folder; name a file" in answer.err
    new = tmp_path / "folder" / "table.md"
    assert veneer("eval", "out/a", "--dataset", "t.jsonl", "--output", new).code == 0
    assert "exact_match" in new.read_text()
