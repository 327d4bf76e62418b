"""`veneer train` around a stand-in for training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from veneer.cli.train import how_to_go_on
from veneer.config import RunConfig
from veneer.errors import NonFiniteLossError

RESULT = {"output_dir": "out", "tokens_per_second": 1700.5, "final_loss": 0.25, "notes": ["learning rate 2e-3"]}


@pytest.fixture
def calls(stub: Any) -> list[Any]:
    seen: list[Any] = []

    def finetune(config: RunConfig, *, resume: bool, progress: bool) -> Any:
        seen.append((config, resume, progress))
        print("progress")
        address = "https://hub.invalid/me/out" if config.hub.push_to_hub else None
        return SimpleNamespace(training=SimpleNamespace(to_json=lambda: dict(RESULT)), address=address)

    facts = {"steps": 80, "warnings": ["--r 4: too little"]}
    stub("veneer.train.dry_run", dry_run=lambda config, progress: {**facts, "r": config.lora.r})
    stub("veneer.evaluate.finetune", finetune=finetune)
    return seen


GIVEN = ("train", "--base-model", "smollm2", "--dataset", "d.jsonl", "--output-dir", "out")


def test_trains_and_tells(veneer: Any, calls: list[Any]) -> None:
    answer = veneer(*GIVEN, "--r", "4", "--resume", "--no-progress")
    assert answer.code == 0
    [(config, resume, progress)] = calls
    assert (config.lora.r, resume, progress) == (4, True, False)
    assert "tokens per second" in answer.out
    assert "note: learning rate 2e-3" in answer.err


def test_notes_are_told_once(veneer: Any, calls: list[Any]) -> None:
    assert "learning rate 2e-3" not in veneer(*GIVEN).err  # training says them beside its bar


def test_a_run_that_is_to_go_on_without_its_settings(veneer: Any, calls: list[Any], tmp_path: Path) -> None:
    answer = veneer("train", "--output-dir", tmp_path, "--resume")
    assert (answer.code, calls) == (2, [])
    assert "veneer train OUTPUT_DIR/run.yaml --resume" in answer.err
    assert "run.yaml" not in veneer("train", "--output-dir", tmp_path).err


def test_data_that_stands_alone(veneer: Any, calls: list[Any]) -> None:
    assert "did you mean --dataset rows.csv?" in veneer("train", "rows.csv").err
    assert "did you mean" not in veneer("train", "rows").err


def test_one_json_object_is_all_there_is(veneer: Any, calls: list[Any]) -> None:
    answer = veneer(*GIVEN, "--json")
    assert json.loads(answer.out) == RESULT
    assert answer.out.count("\n") == 1
    assert "progress" in answer.err
    assert calls[0][1:] == (False, True)


def test_the_address_of_an_upload_is_told(veneer: Any, calls: list[Any]) -> None:
    answer = veneer(*GIVEN, "--push-to-hub", "--hub-model-id", "me/out", "--json")
    assert json.loads(answer.out) == {**RESULT, "address": "https://hub.invalid/me/out"}
    assert calls[0][0].hub.hub_model_id == "me/out"


def test_a_name_without_an_upload_is_an_error(veneer: Any, calls: list[Any]) -> None:
    answer = veneer(*GIVEN, "--hub-model-id", "me/out", "--hub-private-repo")
    assert (answer.code, calls) == (2, [])
    assert "--hub-model-id and --hub-private-repo without --push-to-hub" in answer.err


def test_a_dry_run_does_not_train(veneer: Any, calls: list[Any]) -> None:
    answer = veneer(*GIVEN, "--dry-run", "--json", "--r", "4")
    assert json.loads(answer.out) == {"steps": 80, "warnings": ["--r 4: too little"], "r": 4}
    assert calls == []
    told = veneer(*GIVEN, "--dry-run")
    assert "steps" in told.out
    assert "warning: --r 4: too little" in told.err


def test_bad_settings_never_reach_training(veneer: Any, calls: list[Any]) -> None:
    answer = veneer(*GIVEN, "--r", "0", "--lora-dropout", "1")
    assert (answer.code, answer.out, calls) == (2, "", [])
    assert "--r: got 0" in answer.err
    assert "--lora-dropout: got 1" in answer.err
    assert "`veneer train --help`" in answer.err


def test_an_interruption_tells_how_to_go_on(veneer: Any, stub: Any, calls: list[Any], tmp_path: Path) -> None:
    def finetune(config: RunConfig, **_: Any) -> None:
        (tmp_path / "checkpoints" / "step-40").mkdir(parents=True)
        raise KeyboardInterrupt

    stub("veneer.evaluate.finetune", finetune=finetune)
    answer = veneer(*GIVEN[:-1], tmp_path)
    assert answer.code == 130
    assert "Traceback" not in answer.err
    assert f"step 40 is kept. Go on with: veneer train {tmp_path}/run.yaml --resume" in answer.err


def test_the_last_checkpoint_is_named_by_number(tmp_path: Path) -> None:
    assert "nothing to resume" in how_to_go_on(str(tmp_path))
    for step in ("9", "80", "100", "100.tmp"):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    assert "step 100 is kept" in how_to_go_on(str(tmp_path))


def test_a_loss_that_is_not_finite_is_a_message(veneer: Any, stub: Any, calls: list[Any]) -> None:
    def finetune(config: RunConfig, **_: Any) -> None:
        raise NonFiniteLossError("loss is nan at step 3")

    stub("veneer.evaluate.finetune", finetune=finetune)
    answer = veneer(*GIVEN)
    assert (answer.code, answer.out, answer.err) == (2, "", "veneer: loss is nan at step 3\n")
