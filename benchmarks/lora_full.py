"""LoRA beside full fine-tuning on real text: `python -m benchmarks.lora_full [--data e2e_nlg] [--seeds 0,1,2]`.

SmolLM2-135M-Instruct on 2,000 rows of E2E NLG or of English to French, LoRA of rank 8 on all linear layers and full
fine-tuning by the same loop over the same rows in the same order. Each picks its learning rate by the validation loss
of seed 0, among RATES times the rule of the command line (full: a tenth of the rule at lora_alpha 32); the test file is
read once, by what was picked. Scores with 95 % intervals over rows, of the rows of all seeds together; the paired
difference, whatever it is.

The model has 135M parameters, whose weights were stored in 4 bits once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu_process, record
from benchmarks.gpu_child import MARK

DATA = record.ROOT / os.environ.get("VENEER_DATA", "../shared/data")
ROWS, VALIDATION, EVERY, NEW_TOKENS, AT_ONCE = 2000, 200, 25, 96, 64
RATES: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
FIRST = slice(3, 6)  # of them; the next one is tried while the best stands at the end
SHARES = {"lora": 1.0, "full": 0.1}  # of the rule's rate, in the middle (Schulman et al. 2025: they differ by ten)
BASE = "base"
Made = dict[str, Any]


class Task(NamedTuple):
    """Files of a data set under DATA, the metrics of its answers, and what is said before every prompt."""

    train: str
    dev: str
    test: str
    metrics: tuple[str, ...]
    system_prompt: str | None = None

    def test_rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (DATA / self.test).read_text(encoding="utf-8").splitlines()]


TASKS = {
    "e2e_nlg": Task("e2e_nlg/train.jsonl", "e2e_nlg/dev.jsonl", "e2e_nlg/test.jsonl", ("bleu", "rouge_l")),
    "en_fr": Task(
        "translation/en_fr_train.jsonl",
        "translation/en_fr_dev.jsonl",
        "translation/en_fr_test.jsonl",
        ("bleu", "chrf"),
        "Translate into French.",
    ),
}


def main() -> None:
    """Runs everything and writes benchmarks/results/lora_full.json; what --runs holds is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=TASKS, default="e2e_nlg")
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--epochs", default=1.0, type=float)
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "lora_full_runs.json")
    parser.add_argument("--one", nargs=3, metavar=("SYSTEM", "SEED", "FACTOR"), help="one run, for the program itself")
    parser.add_argument("--only", choices=SHARES, help="make the runs of one system, and write nothing else")
    asked = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"no data at {DATA}; set VENEER_DATA to the folder that holds {TASKS['e2e_nlg'].train}")
    task = TASKS[asked.data]
    if asked.one:
        system, seed, factor = asked.one
        print(MARK + json.dumps(one(task, system, int(seed), float(factor), asked.epochs)))
        return
    held = json.loads(asked.runs.read_text()) if asked.runs.exists() else {}
    made = partial(run, held, asked.runs, asked.data, asked.epochs)
    systems = [asked.only] if asked.only else list(SHARES)
    losses = {system: tried(partial(made, system, asked.seeds[0])) for system in systems}
    picked = {system: min(losses[system], key=losses[system].__getitem__) for system in systems}
    runs = {system: [made(system, seed, picked[system]) for seed in asked.seeds] for system in systems}
    if not asked.only:
        result = {"epochs": asked.epochs, "rows": ROWS, "rank": 8, **compared(task, runs, made(BASE, 0, 0.0))}
        result["picked_among"] = {s: {f"{f:g}": loss for f, loss in losses[s].items()} for s in systems}
        path = record.RESULTS / "lora_full.json"
        others = json.loads(path.read_text(encoding="utf-8"))["data"] if path.exists() else {}
        record.save("lora_full", {"base_model": "smollm2", "data": others | {asked.data: result}})


def tried(made: Callable[[float], Made]) -> dict[float, float]:
    """Losses by factor of the rate: of RATES as many as it takes for the best to stand between two others."""
    found = {factor: made(factor)["best_loss"] for factor in RATES[FIRST]}
    while True:
        best = min(found, key=found.__getitem__)
        at = RATES.index(best)
        beside = [factor for factor in RATES[max(0, at - 1) : at + 2] if factor not in found]
        if not beside:
            return found
        found |= {factor: made(factor)["best_loss"] for factor in beside}


def run(held: dict[str, Made], path: Path, data: str, epochs: float, system: str, seed: int, factor: float) -> Made:
    """One run in a process of its own, so that its peak of memory is its own."""
    name = f"{data} {system} {seed} {factor:g} {epochs:g}"
    if name not in held:
        words = ["-m", "benchmarks.lora_full", "--data", data, "--epochs", str(epochs)]
        words += ["--one", system, str(seed), str(factor)]
        made = gpu_process.read(words, None, 3600.0)
        if "failed" in made:
            sys.exit(f"{name}: {made['failed']}\n" + "\n".join(made.get("traceback", [])))
        held[name] = made
        path.write_text(json.dumps(held))
        told = {key: value for key, value in made.items() if isinstance(value, float)}
        print(f"{name}: {told}", file=sys.stderr, flush=True)
    return held[name]


def one(task: Task, system: str, seed: int, factor: float, epochs: float) -> Made:
    """Trains and writes the answers to the test file; of the base only those."""
    import torch

    from veneer.model.load import load

    loaded = load("smollm2", "float32" if system == "full" else "auto", progress=False)
    if system == BASE:
        return {"texts": answers(task, loaded, None)}
    with tempfile.TemporaryDirectory() as folder:
        job, peak = trained(task, loaded, system, seed, factor, epochs, Path(folder))
    half = torch.bfloat16 if torch.cuda.is_available() or loaded.model.dtype == torch.bfloat16 else torch.float32
    texts = answers(task, loaded, job.slot) if system == "lora" else answers(task, dense(loaded, half), None)
    steps = [line for line in job.history if line["split"] == "train"]
    seconds = dict(zip((line["step"] for line in steps), accumulate(line["seconds"] for line in steps), strict=True))
    return {
        "learning_rate": job.learning_rate,
        "best_loss": job.best_loss,
        "best_step": job.best_step,
        "curve": [
            {"step": line["step"], "loss": line["loss"], "seconds": seconds.get(line["step"], 0.0)}
            for line in job.history
            if line["split"] == "eval"
        ],
        "trained": len(job.flat),
        "train_seconds": job.seconds,
        "peak_gib": peak / 2**30,
        "texts": texts,
    }


def trained(
    task: Task, loaded: Any, system: str, seed: int, factor: float, epochs: float, folder: Path
) -> tuple[Any, int]:
    """The job at its end, its best values in place, and the peak of memory in bytes."""
    from benchmarks import full_loop
    from veneer.adapter.attach import attach, methods_of
    from veneer.config import LoraSettings, RunConfig
    from veneer.train.job import Job, total_steps
    from veneer.train.loop import loop
    from veneer.train.record import peak_memory_bytes
    from veneer.train.rows import read_data
    from veneer.train.schedule import choose_rate

    config = RunConfig.from_flat(
        {
            "base_model": "smollm2",
            "dataset": str(head(DATA / task.train, ROWS, folder)),
            "eval_dataset": str(head(DATA / task.dev, VALIDATION, folder)),
            "system_prompt": task.system_prompt,
            "output_dir": f"{folder}/out",
            "num_train_epochs": epochs,
            "eval_steps": EVERY,
            "r": 8,
            "lora_alpha": 16,
            "seed": seed,
        }
    )
    data = read_data(config, loaded.tokenizer)
    steps = total_steps(config.train, len(data.train))
    lora = config.lora if system == "lora" else LoraSettings()  # full fine-tuning has no scale to make up for
    rate = choose_rate(config.train, lora, loaded.model.config, steps).value * SHARES[system] * factor
    if system == "full":
        job = full_loop.train(loaded.model, data, config.train, rate)
    else:
        attach(loaded.model, config.lora, "default", seed=seed)
        job = Job("default", config.train, data.train, data.validation, rate, methods_of(loaded.model, "default"))
        loop(loaded.model, [job], record=lambda job, facts: job.history.append(facts), save=lambda _: None)
    return job, peak_memory_bytes(job.flat.values_P.device)


def head(path: Path, rows: int, folder: Path) -> Path:
    """The first rows of a file; of the development set without the other references, which training does not read."""
    lines = path.read_text(encoding="utf-8").splitlines()[:rows]
    made = folder / path.name
    made.write_text("\n".join(lines), encoding="utf-8")
    return made


def dense(loaded: Any, dtype: Any) -> Any:
    """The fully trained model as it would be used: in the dtype of its products."""
    loaded.model.requires_grad_(False).to(dtype)
    return loaded


def answers(task: Task, loaded: Any, slot: str | None) -> list[str]:
    """Greedy answers to the test file."""
    from veneer.data.chat import Template, conversation
    from veneer.model.generate import generate

    template = Template(loaded.tokenizer, task.system_prompt)
    prompts = [template.prompt_ids(conversation(row, "test")) for row in task.test_rows()]
    return generate(loaded.model, loaded.tokenizer, prompts, slot, NEW_TOKENS, batch_size=AT_ONCE)


def compared(task: Task, runs: dict[str, list[Made]], base: Made) -> dict[str, Any]:
    """Scores of each system, LoRA less full, and what reaching full's best loss took of LoRA."""
    figures = {system: [summary(made) for made in each] for system, each in runs.items()}
    texts = {system: [made["texts"] for made in each] for system, each in runs.items()} | {BASE: [base["texts"]]}
    pairs = zip(runs["lora"], runs["full"], strict=True)
    reached = [reaching(lora["curve"], full["best_loss"]) for lora, full in pairs]
    return {"runs": figures, "scores": {m: scored(m, task, texts) for m in task.metrics}, "lora_reaches_full": reached}


def summary(made: Made) -> Made:
    """A run without its answers."""
    return {key: value for key, value in made.items() if key not in ("texts", "traceback")}


def scored(name: str, task: Task, texts: dict[str, list[list[str]]]) -> dict[str, Any]:
    """One metric: each system's score over all seeds and of each, and the paired difference of the two that train."""
    from veneer.evaluate.metrics import metric

    measure = metric(name)
    references = [row.get("references") or [row["completion"]] for row in task.test_rows()]

    def statistics(answers: list[str]) -> Sequence[Sequence[float]]:
        return measure.statistics(answers, references, measure(answers, references))

    each = {system: [statistics(answers) for answers in seeds] for system, seeds in texts.items()}
    # A row's statistics add up over seeds as they do over rows: an interval is over rows, not over three seeds.
    pooled = {
        s: [[sum(v) for v in zip(*row, strict=True)] for row in zip(*seeds, strict=True)] for s, seeds in each.items()
    }
    found: dict[str, Any] = {s: measure.summary.score(rows).to_json() for s, rows in pooled.items()}
    for system, seeds in each.items():
        found[system]["seeds"] = [measure.summary.score(rows).score for rows in seeds]
    return found | {"lora_less_full": measure.summary.difference(pooled["lora"], pooled["full"]).to_json()}


def reaching(curve: Sequence[Made], loss: float) -> Made | None:
    """The first validation of LoRA that is as good as the best of full fine-tuning; None where there is none."""
    return next((point for point in curve if point["loss"] <= loss), None)


if __name__ == "__main__":
    main()
