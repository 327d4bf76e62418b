"""What a dry run tells is what the run then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.data.batches import Batches
from veneer.model.load import load
from veneer.train import dry_run, prepare
from veneer.train.dry_run import Pace
from veneer.train.job import Job
from veneer.train.run import train


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that a dry run makes, as it leaves them."""
    made: list[Job] = []

    def watched(*given: Any) -> Job:
        made.append(Job(*given))
        return made[-1]

    monkeypatch.setattr(prepare, "Job", watched)
    return made


@pytest.mark.parametrize(
    "options",
    [{"eval_steps": 5}, {"gradient_accumulation_steps": 3, "max_steps": "none", "num_train_epochs": 1.5}],
)
def test_it_counts_what_the_run_then_counts(config: Any, options: dict[str, Any]) -> None:
    one = config(gradient_checkpointing=True, **options)
    facts = dry_run.dry_run(one)
    assert not Path(one.output_dir).exists()
    result = train(one, progress=False)
    lines = [json.loads(line) for line in Path(one.output_dir, "metrics.jsonl").read_text().splitlines()]
    assert (facts["steps"], facts["tokens_of_the_run"]) == (result.steps, result.tokens)
    assert facts["trainable_parameters"] == result.trainable_parameters
    assert facts["learning_rate"] == result.learning_rate
    assert facts["warnings"] == list(result.warnings)
    # This process's own peak so far, and a tenth: most of both is Python and torch.
    assert facts["peak_memory_bytes"] == pytest.approx(1.1 * result.peak_memory_bytes, rel=0.1)
    assert facts["train_seconds_between"][0] <= facts["train_seconds"] <= facts["train_seconds_between"][1]
    job = Job("x", one.train, result_rows(facts["rows"]), result_rows(1), 1e-3, methods())
    assert dry_run.validations(job) == sum(line["split"] == "eval" for line in lines)
    assert json.loads(json.dumps(facts)) == facts


def result_rows(count: int) -> list[Any]:
    from veneer.data.chat import Example

    return [Example((0, 1), (False, True), row, 0) for row in range(count)]


def methods() -> dict[str, Any]:
    from veneer.methods.lora import LoRA

    return {"layer": LoRA(torch.zeros(1, 2), torch.zeros(2, 1), 1.0, 0.0)}


def test_the_largest_pass_is_among_what_it_takes(
    config: Any, tmp_path: Path, jobs: list[Job], monkeypatch: Any
) -> None:
    data = tmp_path / "one-long.jsonl"
    long, _ = Batches(24, 2, seed=0).rows(9)  # its step, the tenth of 12
    rows = [{"prompt": f"Write {n}", "completion": "one " * (60 if n == long else 2)} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[tuple[int, int]] = []

    def watched(feed: Any, active: list[Job]) -> Any:
        step, begun = active[0].step, begin(feed, active)
        seen.append((step, int(begun.answers[0, 1])))
        return begun

    begin = dry_run.begin_step
    monkeypatch.setattr(dry_run, "begin_step", watched)
    dry_run.dry_run(config(dataset=str(data), validation_split=0, eval_steps=None, per_device_train_batch_size=2))
    [job] = jobs
    most = max(sum(len(job.train[row].input_ids) for row in job.batches.rows(step)) for step in range(job.total))
    assert seen[-1] == (9, most)
    assert max(tokens for _, tokens in seen[:-2]) < most, "an earlier step was as large: it tests nothing"


def test_it_leaves_the_adapter_as_it_was(config: Any, jobs: list[Job]) -> None:
    one = config(weight_decay=0.5)
    dry_run.dry_run(one)
    [job] = jobs
    fresh = prepare.prepare(one, prepare.Ranks()).job
    assert torch.equal(job.flat.values_P, fresh.flat.values_P)


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_the_base_is_counted_by_its_numbers_and_not_by_its_bytes(pico_folder: Path, storage: str) -> None:
    model = load(str(pico_folder), "float32", storage=storage).model
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32
    vocabulary = model.config.vocab_size * 32  # embedding and head are one
    assert dry_run.base_parameters(model) == 2 * layer + vocabulary + 32


def test_seconds_are_by_tokens(pico: Any, job: Any, examples: Any) -> None:
    one = job(pico, "one", examples(8), examples(4), max_steps=4, eval_steps=3)
    tokens = sum(len(example.input_ids) for example in one.train) * 2  # 4 steps of 4 rows
    assert dry_run.tokens_of_run(one) == tokens
    facts = dry_run.seconds_of_run(one, Pace([1.0, 2.0, 6.0], 0.5))
    assert facts["train_seconds"] == 3 * tokens
    assert facts["train_seconds_between"] == [tokens, 6 * tokens]
    checked = sum(len(example.input_ids) for example in one.validation)
    assert facts["validation_seconds"] == 3 * 0.5 * checked  # before, at step 3, at the end
