"""The 24 small tasks of the merge experiment: their rows, adapters trained on them at once, and how one is scored.

A score is the share of test rows that greedy decoding answers right to the last token, read from one packed pass: an
answer is the greedy one exactly where each of its tokens is the likeliest after those before it. Of pos_tags, whose
answers are long, the share of right tokens. A row with several right answers is right with any of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import record

DATA = record.ROOT / os.environ.get("VENEER_DATA", "../shared/data") / "multitask"
RANK, BATCH, EPOCHS, HELD_OUT = 8, 16, 4.0, 30
BY_TOKENS = ("pos_tags",)
AT_ONCE = 24  # adapters that are trained in one loop
TOKENS = 16384  # of a pass that scores
Row = dict[str, Any]


def names(data: Path = DATA) -> list[str]:
    """All tasks, by name."""
    return sorted(task["task"] for task in json.loads((data / "tasks.json").read_text(encoding="utf-8")))


def rows(task: str, part: str, data: Path = DATA) -> list[Row]:
    """Rows of `train` or `test`."""
    return [json.loads(line) for line in (data / task / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def trained(
    loaded: Any, sets: Mapping[str, Sequence[Row]], seed: int = 0, earlier: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, Any]:
    """An adapter for each name, trained on its rows, apart from `earlier` adapters (`train.earlier.Earlier`) where it
    has any; as many at once as AT_ONCE allows."""
    found: dict[str, Any] = {}
    whole = list(sets.items())
    for start in range(0, len(whole), AT_ONCE):
        found |= _trained(loaded, dict(whole[start : start + AT_ONCE]), seed, earlier or {})
    return found


def _trained(
    loaded: Any, sets: Mapping[str, Sequence[Row]], seed: int, earlier: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    from veneer.adapter.attach import attach, detach, methods_of
    from veneer.adapter.take import take
    from veneer.config import LoraSettings, TrainSettings
    from veneer.config.orthogonal import OrthogonalToSettings
    from veneer.train.earlier import orthogonality
    from veneer.train.job import Job, total_steps
    from veneer.train.loop import loop
    from veneer.train.schedule import choose_rate

    lora = LoraSettings(r=RANK, lora_alpha=2 * RANK)
    train = TrainSettings(per_device_train_batch_size=BATCH, num_train_epochs=EPOCHS, seed=seed)
    jobs = []
    for name, mine in sets.items():
        attach(loaded.model, lora, name, seed=seed)
        examples = encoded(loaded, mine)
        held, kept = examples[:HELD_OUT], examples[HELD_OUT:]
        rate = choose_rate(train, lora, loaded.model.config, total_steps(train, len(kept))).value
        methods = methods_of(loaded.model, name)
        apart = orthogonality(earlier.get(name, ()), loaded.model, methods, OrthogonalToSettings())
        jobs.append(Job(name, train, kept, held, rate, methods, orthogonality=apart))
    loop(loaded.model, jobs, record=lambda job, facts: None, save=lambda _: None)
    made = {name: take(loaded.model, name, base_name=loaded.name) for name in sets}
    detach(loaded.model)
    return made


def encoded(loaded: Any, mine: Sequence[Row]) -> tuple[Any, ...]:
    """Rows as examples; every one has targets, none is cut."""
    from veneer.data.chat import Template
    from veneer.data.encode import encode

    return tuple(encode(mine, Template(loaded.tokenizer), 1024, "multitask").examples)


class Test:
    """Rows of a task, encoded once, with every right answer of each: of its test file, or `held` out of training."""

    def __init__(self, loaded: Any, task: str, part: str = "test", data: Path = DATA) -> None:
        self.task = task
        found = rows(task, "test", data) if part == "test" else rows(task, "train", data)[:HELD_OUT]
        self.owners = [i for i, row in enumerate(found) for _ in row.get("references") or [None]]
        answers = [
            {**row, "completion": reference or row["completion"]}
            for row in found
            for reference in row.get("references") or [None]
        ]
        for answer in answers:
            answer.pop("references", None)
        self.examples = encoded(loaded, answers)
        assert len(self.examples) == len(answers)
        self.count = len(found)

    def scores(self, found: Sequence[Any]) -> dict[str, float]:
        """Of the likelihoods of all examples. `score`: the mean over rows; `loss`: nats a token of each row's first
        right answer."""
        values: list[float] = [0.0] * self.count
        first: dict[int, Any] = {}
        for owner, likelihood in zip(self.owners, found, strict=True):
            share = likelihood.hits / likelihood.tokens
            values[owner] = max(values[owner], share if self.task in BY_TOKENS else float(share == 1.0))
            first.setdefault(owner, likelihood)
        nll, tokens = sum(each.nll for each in first.values()), sum(each.tokens for each in first.values())
        return {"score": sum(values) / self.count, "loss": nll / tokens}


def scores(loaded: Any, slot: str | None, tests: Sequence[Test]) -> list[dict[str, float]]:
    """Of each test with `slot` on; the rows of all of them share their passes, since those of one fill none."""
    from veneer.model.likelihood import sequence_likelihoods

    examples = [example for test in tests for example in test.examples]
    found = iter(sequence_likelihoods(loaded.model, examples, slot, TOKENS))
    return [test.scores(list(islice(found, len(test.examples)))) for test in tests]
