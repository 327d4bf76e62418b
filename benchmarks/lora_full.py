"""LoRA beside full fine-tuning on real text: `python -m benchmarks.lora_full [--seeds 0,1,2] [--epochs 1]`.

SmolLM2-135M-Instruct on 2,000 rows of E2E NLG, LoRA of rank 8 on all linear layers and full fine-tuning by the same
loop over the same rows in the same order. Each picks its learning rate by the validation loss of seed 0, among RATES
times the rule of the command line (full: times a tenth of it); the test file is read once, by what was picked. BLEU and
ROUGE-L with 95 % intervals over rows, of the rows of all seeds together; the paired difference, whatever it is.

The model has 135M parameters, whose weights were stored in 4 bits once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks import gpu_process, record
from benchmarks.gpu_child import MARK

DATA = record.ROOT / os.environ.get("VENEER_DATA", "../shared/data") / "e2e_nlg"
ROWS, VALIDATION, EVERY, NEW_TOKENS = 2000, 200, 25, 96
METRICS = ("bleu", "rouge_l")
RATES = (0.3, 1.0, 3.0)
SHARES = {"lora": 1.0, "full": 0.1}  # of the rule's rate, in the middle (Schulman et al. 2025: they differ by ten)
BASE = "base"
Made = dict[str, Any]


def main() -> None:
    """Runs everything and writes benchmarks/results/lora_full.json; what --runs holds is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--epochs", default=1.0, type=float)
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "lora_full_runs.json")
    parser.add_argument("--one", nargs=3, metavar=("SYSTEM", "SEED", "FACTOR"), help="one run, for the program itself")
    parser.add_argument("--only", choices=SHARES, help="make the runs of one system, and write nothing else")
    asked = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"no data at {DATA}; set VENEER_DATA to the folder that holds e2e_nlg")
    if asked.one:
        system, seed, factor = asked.one
        print(MARK + json.dumps(one(system, int(seed), float(factor), asked.epochs)))
        return
    held = json.loads(asked.runs.read_text()) if asked.runs.exists() else {}
    made = partial(run, held, asked.runs, asked.epochs)
    systems = [asked.only] if asked.only else list(SHARES)
    picked = {system: min(RATES, key=lambda f: made(system, asked.seeds[0], f)["best_loss"]) for system in systems}
    runs = {system: [made(system, seed, picked[system]) for seed in asked.seeds] for system in systems}
    if not asked.only:
        result = {"epochs": asked.epochs, "rows": ROWS, "rank": 8, **compared(runs, made(BASE, 0, 0.0))}
        result["picked_among"] = {s: {str(f): made(s, asked.seeds[0], f)["best_loss"] for f in RATES} for s in systems}
        record.save("lora_full", result)


def run(held: dict[str, Made], path: Path, epochs: float, system: str, seed: int, factor: float) -> Made:
    """One run in a process of its own, so that its peak of memory is its own."""
    name = f"{system} {seed} {factor:g} {epochs:g}"
    if name not in held:
        words = ["-m", "benchmarks.lora_full", "--epochs", str(epochs), "--one", system, str(seed), str(factor)]
        made = gpu_process.read(words, None, 3600.0)
        if "failed" in made:
            sys.exit(f"{name}: {made['failed']}\n" + "\n".join(made.get("traceback", [])))
        held[name] = made
        path.write_text(json.dumps(held))
        told = {key: value for key, value in made.items() if isinstance(value, float)}
        print(f"{name}: {told}", file=sys.stderr, flush=True)
    return held[name]


def one(system: str, seed: int, factor: float, epochs: float) -> Made:
    """Trains and writes the answers to the test file; of the base only those."""
    import torch

    from veneer.model.load import load

    loaded = load("smollm2", "float32" if system == "full" else "auto", progress=False)
    if system == BASE:
        return {"texts": answers(loaded, None)}
    with tempfile.TemporaryDirectory() as folder:
        job, peak = trained(loaded, system, seed, factor, epochs, Path(folder))
    half = torch.bfloat16 if torch.cuda.is_available() or loaded.model.dtype == torch.bfloat16 else torch.float32
    texts = answers(loaded, job.slot) if system == "lora" else answers(dense(loaded, half), None)
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


def trained(loaded: Any, system: str, seed: int, factor: float, epochs: float, folder: Path) -> tuple[Any, int]:
    """The job at its end, its best values in place, and the peak of memory in bytes."""
    from benchmarks import full_loop
    from veneer.adapter.attach import attach, methods_of
    from veneer.config import RunConfig
    from veneer.train.job import Job, total_steps
    from veneer.train.loop import loop
    from veneer.train.record import peak_memory_bytes
    from veneer.train.rows import read_data
    from veneer.train.schedule import choose_rate

    config = RunConfig.from_flat(
        {
            "base_model": "smollm2",
            "dataset": str(head(DATA / "train.jsonl", ROWS, folder)),
            "eval_dataset": str(head(DATA / "dev.jsonl", VALIDATION, folder)),
            "output_dir": f"{folder}/out",
            "num_train_epochs": epochs,
            "eval_steps": EVERY,
            "r": 8,
            "lora_alpha": 16,
            "seed": seed,
        }
    )
    data = read_data(config, loaded.tokenizer)
    rule = choose_rate(config.train, config.lora, loaded.model.config, total_steps(config.train, len(data.train))).value
    rate = rule * SHARES[system] * factor
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


def answers(loaded: Any, slot: str | None) -> list[str]:
    """Greedy answers to the test file."""
    from veneer.data.chat import Template, conversation
    from veneer.model.generate import generate

    template = Template(loaded.tokenizer)
    prompts = [template.prompt_ids(conversation(row, "test")) for row in test_rows()]
    return generate(loaded.model, loaded.tokenizer, prompts, slot, NEW_TOKENS, batch_size=32)


def test_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()]


def compared(runs: dict[str, list[Made]], base: Made) -> dict[str, Any]:
    """Scores of each system, LoRA less full, and what reaching full's best loss took of LoRA."""
    figures = {system: [summary(made) for made in each] for system, each in runs.items()}
    texts = {system: [made["texts"] for made in each] for system, each in runs.items()} | {BASE: [base["texts"]]}
    pairs = zip(runs["lora"], runs["full"], strict=True)
    reached = [reaching(lora["curve"], full["best_loss"]) for lora, full in pairs]
    return {"runs": figures, "scores": {name: scored(name, texts) for name in METRICS}, "lora_reaches_full": reached}


def summary(made: Made) -> Made:
    """A run without its answers."""
    return {key: value for key, value in made.items() if key not in ("texts", "traceback")}


def scored(name: str, texts: dict[str, list[list[str]]]) -> dict[str, Any]:
    """One metric: each system's score over all seeds and of each, and the paired difference of the two that train."""
    from veneer.evaluate.metrics import metric

    measure, references = metric(name), [row["references"] for row in test_rows()]

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
