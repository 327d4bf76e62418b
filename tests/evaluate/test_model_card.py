"""The model card: what the Hub reads, what people read, and what must not stand in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from veneer.adapter.card import Adapter, Card
from veneer.evaluate.model_card import MARK, model_card, write_model_card
from veneer.evaluate.run import Result

TRAINING = {
    "options": {"dataset": "/srv/secret/tr|ain.jsonl", "r": 8, "max_steps": 40, "num_train_epochs": 3.0},
    "data": {"rows": 1568, "validation_rows": 32},
    "eval_loss_before": 2.5,
    "best_eval_loss": 0.25,
}


def card(base_name: str | None = "lab/base-1B", training: dict[str, Any] = TRAINING) -> Card:
    return Card("lora", {}, {"q": 2.0}, {"q": 2}, base_name=base_name, storage="nf4 bfloat16", training=training)


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads() -> None:
    about = front(model_card(card(), None, "me/skill"))
    assert (about["base_model"], about["library_name"]) == ("lab/base-1B", "peft")
    assert {"base_model:adapter:lab/base-1B", "lora"} <= set(about["tags"])


def test_the_hub_accepts_it() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(model_card(card(), None, "me/skill")).data
    assert (data.base_model, data.pipeline_tag) == ("lab/base-1B", "text-generation")


@pytest.mark.parametrize("name", ["/srv/secret/base", "smollm2", "models/base.gguf/../x", None])
def test_a_base_that_the_hub_does_not_have_is_no_base_there(name: str | None) -> None:
    text = model_card(card(name), None, "me/skill")
    assert "base_model" not in front(text)
    assert "secret" not in text
    assert '"BASE"' in text
    assert ("--base-model BASE" in text) is (name != "smollm2")  # which veneer knows by that name


def test_scores_stand_with_their_intervals(result: Result) -> None:
    text = model_card(card(), result, "me/skill")
    assert "On 32 rows of `test.jsonl`" in text
    assert "| exact match | 0.375 [0.22, 0.53] | 0.625 [0.47, 0.78] | 0.25 [0.05, 0.45] |" in text
    assert "| loss | 2.1 [2, 2.25] | 0.031 |" in text  # no interval: none is claimed


def test_without_an_evaluation_the_validation_loss_stands_there() -> None:
    assert "on 32 rows held out of training: 2.5 before, 0.25 after" in model_card(card(), None, "me/skill")
    assert "has not been evaluated" in model_card(card(training={}), None, "me/skill")


def test_settings_are_those_that_counted() -> None:
    text = model_card(card(), None, "me/skill")
    assert "| r | `8` |" in text
    assert "| max_steps | `40` |" in text
    assert "num_train_epochs" not in text
    assert "| data | `tr&#124;ain.jsonl` |" in text  # one cell, whatever the file is called
    assert "secret" not in text


def test_it_is_made_anew_until_someone_makes_it_their_own(tmp_path: Path, result: Result) -> None:
    factors = {"q.a": torch.ones(2, 3), "q.b": torch.ones(4, 2)}
    Adapter(factors, card()).save(tmp_path)
    assert "Validation loss" in write_model_card(tmp_path).read_text()
    (tmp_path / "evaluation.json").write_text(json.dumps(result.to_json()))
    text = write_model_card(tmp_path, "me/skill").read_text()
    assert "exact match" in text and "hf download me/skill" in text
    (tmp_path / "README.md").write_text(text.replace(MARK, "") + "mine")
    assert write_model_card(tmp_path).read_text().endswith("mine")
