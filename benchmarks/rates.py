"""Which learning rate, at which rank and scale: `python -m benchmarks.rates [--tasks gsm8k,nli]`.

Adapters on SmolLM2-135M (135M parameters, whose weights were stored in 4 bits once) for every task, every (r,
lora_alpha) of SCALES and every rate: FACTORS times the rule 5e-5 · 10 · (2000 / hidden)^0.781 of 'LoRA Without Regret'
(Schulman et al. 2025), which was fitted at lora_alpha 32. All adapters of a task train at once, over the same rows in
the same order from the same seed. Told is the lowest validation loss of each, the one before training included, beside
the base's. Tasks are the 24 small ones of `benchmarks.multitask` (270 rows, 4 epochs, batches of 16) and the data sets
of LARGE (2,000 rows drawn once, or what there is; one epoch, batches of 8).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import lora_full, multitask, record
from benchmarks.tasks import TASKS

FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SCALES = ((16, 32), (8, 32), (8, 16))  # (r, lora_alpha)
ROWS, HELD_OUT, BATCH, EVERY, LONGEST, SEED = 2000, 100, 8, 50, 1024, 0


class Large(NamedTuple):
    """A data set under the data folder, and what is said before every prompt."""

    file: str
    system_prompt: str | None = None


LARGE = {
    **{name: Large(task.train, task.system_prompt) for name, task in lora_full.TASKS.items()},
    **{name: Large(TASKS[name]["files"][0], TASKS[name]["prompt"]) for name in ("sst2", "geoquery", "dialogsum")},
    "banking77": Large("intent/banking77_train.jsonl", "Name the customer's intent."),
    "gsm8k": Large("gsm8k/train.jsonl"),
    "alpaca": Large("instruct/alpaca_train.jsonl"),
}


def main() -> None:
    """Sweeps task after task and writes benchmarks/results/rates.json after each; other tasks' figures stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "rates.json")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after that")
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    if not multitask.DATA.is_dir():
        sys.exit(f"no data at {multitask.DATA}; set VENEER_DATA to the folder that holds multitask")
    from veneer.model.load import load

    loaded = load("smollm2", progress=False)
    found = json.loads(asked.output.read_text(encoding="utf-8"))["tasks"] if asked.output.exists() else {}
    for task in asked.tasks or [*LARGE, *multitask.names()]:
        if task in found or time.monotonic() > until:
            continue
        begun = time.monotonic()
        found[task] = swept(loaded, task)
        record.save(asked.output.stem, {"base_model": "smollm2", "tasks": found}, asked.output.resolve().parent)
        print(f"{task}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def swept(loaded: Any, task: str) -> dict[str, Any]:
    """The lowest validation loss by scale and rate, the base's, the rule's rate and how many steps were taken."""
    from veneer.adapter.attach import attach, detach, methods_of
    from veneer.config import LoraSettings
    from veneer.model.likelihood import sequence_likelihoods
    from veneer.train.job import Job
    from veneer.train.loop import loop
    from veneer.train.schedule import choose_rate

    held, kept, train = data(loaded, task)
    rule = choose_rate(train, LoraSettings(), loaded.model.config, 1000).value  # the rule of long runs for all
    jobs = {}
    for r, alpha in SCALES:
        for factor in FACTORS:
            slot = f"r{r}-alpha{alpha}-{FACTORS.index(factor)}"
            attach(loaded.model, LoraSettings(r=r, lora_alpha=alpha), slot, seed=SEED)
            rate = rule * factor
            jobs[r, alpha, factor] = Job(slot, train, kept, held, rate, methods_of(loaded.model, slot))
    loop(loaded.model, list(jobs.values()), record=lambda job, facts: None, save=lambda _: None)
    detach(loaded.model)
    before = sequence_likelihoods(loaded.model, held, None, 16384)
    return {
        "rows": len(kept),
        "steps": next(iter(jobs.values())).total,
        "rule": rule,
        "base": sum(one.nll for one in before) / sum(one.tokens for one in before),
        "losses": {
            f"r{r}-alpha{alpha}": {f"{factor:g}": jobs[r, alpha, factor].best_loss for factor in FACTORS}
            for r, alpha in SCALES
        },
    }


def data(loaded: Any, task: str) -> tuple[Any, Any, Any]:
    """Examples held out, those trained on, and the settings of the run."""
    from veneer.config import TrainSettings
    from veneer.data.chat import Template
    from veneer.data.encode import encode
    from veneer.data.sources import read_source

    if task not in LARGE:
        examples = multitask.encoded(loaded, multitask.rows(task, "train"))
        epochs, batch = multitask.EPOCHS, multitask.BATCH
        settings = TrainSettings(per_device_train_batch_size=batch, num_train_epochs=epochs, seed=SEED)
        return examples[: multitask.HELD_OUT], examples[multitask.HELD_OUT :], settings
    large = LARGE[task]
    whole = read_source(str(multitask.DATA.parent / large.file)).rows
    rows = random.Random(SEED).sample(whole, min(ROWS + HELD_OUT, len(whole)))  # some files are in order of the answers
    examples = tuple(encode(rows, Template(loaded.tokenizer, large.system_prompt), LONGEST, task).examples)
    settings = TrainSettings(per_device_train_batch_size=BATCH, num_train_epochs=1, eval_steps=EVERY, seed=SEED)
    return examples[:HELD_OUT], examples[HELD_OUT:], settings


if __name__ == "__main__":
    main()
