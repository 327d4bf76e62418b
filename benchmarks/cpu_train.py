"""Training on CPU: ours, PEFT + transformers.Trainer, TRL's SFTTrainer, interleaved. `python -m benchmarks.cpu_train`.

Every system trains LoRA of rank 8 on all linear layers of SmolLM2-135M, AdamW, on the same 8 rows of E2E NLG a step in
the same order, with loss on the completion only. First each peer's variants are tried once and the fastest is kept;
then come the rounds, each with every system in a process of its own and in rotated order. What is compared is the
median of the per-round ratios. The losses of the first step must agree, or the systems did not do the same work.

Tokens are counted as the rows have them; veneer computes a beginning that rows of a step share once, and says how much
that is (`shared_percent`).

The model is 135M parameters whose weights were stored in 4 bits once: speed and memory are the point here, not quality.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import peers_cpu, record

DATA = record.ROOT / os.environ.get("VENEER_DATA", "../shared/data") / "e2e_nlg" / "train.jsonl"
WARM_UP = 2  # steps left out of tokens/s: compiling, first touch of memory
TRIAL_STEPS = 6
LAST = 5  # losses averaged as the final loss
SAME_WORK = 0.02  # nats a token: bf16 moves the first loss, about 2.1, by up to 0.01; other rows move it by 0.1

Figures = dict[str, Any]


# ------------------------------------------------------------------------------------------------ one system, one run


def ours(work: Path, steps: int) -> Figures:
    """veneer with its defaults, where the work itself does not fix them; runs in the process that calls it."""
    from veneer.config import RunConfig
    from veneer.train.run import train

    output = work / "ours"
    config = RunConfig.from_flat(
        {
            "base_model": str(work / "model-bfloat16"),
            "dataset": str(work / "rows.jsonl"),
            "validation_split": 0,
            "output_dir": str(output),
            "max_steps": steps,
            "per_device_train_batch_size": peers_cpu.ROWS_PER_STEP,
            "r": peers_cpu.RANK,
            "lora_alpha": peers_cpu.ALPHA,
            "learning_rate": peers_cpu.LEARNING_RATE,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.0,
            "seed": 0,
        }
    )
    train(config)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    trained = [line for line in map(json.loads, lines) if line["split"] == "train"]
    return {
        "step_seconds": [line["seconds"] for line in trained],
        "losses": [line["loss"] for line in trained],
        "peak_bytes": peers_cpu.peak_bytes(),
    }


def run(system: str, variant: str, work: Path, steps: int, tokens: list[int]) -> Figures:
    """Run one system in a fresh process; its figures over the warm steps."""
    output = work / "figures.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", *_module(system, variant, work), "--steps", str(steps), "--output", str(output)]
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=record.ROOT, env=_environment(), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{system} ({variant}) failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return figures(json.loads(output.read_text(encoding="utf-8")), tokens[:steps], seconds) | {"variant": variant}


def _module(system: str, variant: str, work: Path) -> list[str]:
    if system == "ours":
        return ["benchmarks.cpu_train", "--ours", str(work)]
    return ["benchmarks.peers_cpu", system, str(work), "--variant", variant]


def _environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def figures(raw: Figures, tokens: list[int], process_seconds: float) -> Figures:
    """What is compared, from one run's raw times; `tokens` are the real (not padding) tokens of each step."""
    seconds = raw["step_seconds"]
    if len(seconds) != len(tokens):
        raise SystemExit(f"{len(seconds)} step times for {len(tokens)} steps")
    warm = median(seconds[WARM_UP:])
    return {
        "tokens_per_second": median(t / s for t, s in zip(tokens[WARM_UP:], seconds[WARM_UP:], strict=True)),
        "process_seconds": process_seconds,  # imports, loading, compiling, training, saving
        "train_seconds": sum(seconds),
        "warm_train_seconds": sum(seconds[WARM_UP:]),
        "compile_seconds": max(0.0, sum(seconds[:WARM_UP]) - WARM_UP * warm),  # first steps beyond what they cost warm
        "peak_gib": raw["peak_bytes"] / 2**30,
        "first_loss": raw["losses"][0],
        "final_loss": sum(raw["losses"][-LAST:]) / len(raw["losses"][-LAST:]),
        "step_seconds": seconds,
        "losses": raw["losses"],
    }


# ------------------------------------------------------------------------------------------------- the whole comparison


def compare(work: Path, rounds: int, steps: int) -> Figures:
    """Trials, then `rounds` interleaved rounds, then ratios."""
    tokens = step_tokens(work, steps)
    trials = {peer: _trials(peer, work, min(steps, TRIAL_STEPS), tokens) for peer in peers_cpu.VARIANTS}
    variants = {"ours": "default"} | {peer: _fastest(tried) for peer, tried in trials.items()}
    runs: dict[str, list[Figures]] = {system: [] for system in variants}
    for number in range(rounds):
        for system in rotated(list(variants), number):
            runs[system].append(run(system, variants[system], work, steps, tokens))
            _say(f"round {number + 1}/{rounds}  {system:5}", runs[system][-1])
    _check_same_work(runs)
    return {
        "ratio": ratios(runs, "tokens_per_second"),
        "memory_ratio": ratios(runs, "peak_gib"),
        "median": {system: _medians(made) for system, made in runs.items()},
        "work": {"steps": steps, "rounds": rounds, "rows_per_step": peers_cpu.ROWS_PER_STEP, "tokens": tokens},
        "shared_percent": 100 * (1 - sum(computed_tokens(work, steps)) / sum(tokens)),
        "variants": variants,
        "trials": trials,
        "runs": runs,
    }


def step_tokens(work: Path, steps: int) -> list[int]:
    """Real tokens of each step."""
    examples, size = peers_cpu.in_order(work, steps), peers_cpu.ROWS_PER_STEP
    return [sum(len(e["input_ids"]) for e in examples[at : at + size]) for at in range(0, len(examples), size)]


def computed_tokens(work: Path, steps: int) -> list[int]:
    """Tokens of each step that veneer computes: what its rows begin with alike (here the system prompt) once."""
    from veneer.model.stream import shared

    examples, size = peers_cpu.in_order(work, steps), peers_cpu.ROWS_PER_STEP
    batches = [[e["input_ids"] for e in examples[at : at + size]] for at in range(0, len(examples), size)]
    return [sum(len(segment.tokens) for segment in shared(batch)[0]) for batch in batches]


def _trials(peer: str, work: Path, steps: int, tokens: list[int]) -> dict[str, Figures]:
    tried = {}
    for variant in peers_cpu.VARIANTS[peer]:
        tried[variant] = run(peer, variant, work, steps, tokens)
        _say(f"trial  {peer:5} {variant}", tried[variant])
    return tried


def _fastest(tried: dict[str, Figures]) -> str:
    return max(tried, key=lambda variant: tried[variant]["tokens_per_second"])


def rotated(systems: list[str], number: int) -> list[str]:
    """Another system begins each round, so that none always runs on a machine just warmed or just throttled."""
    at = number % len(systems)
    return systems[at:] + systems[:at]


def ratios(runs: dict[str, list[Figures]], figure: str) -> Figures:
    """Ours over each peer, round by round."""
    values = {system: [made[figure] for made in rounds] for system, rounds in runs.items()}
    return {peer: record.ratios(values["ours"], values[peer]) for peer in values if peer != "ours"}


def _medians(made: list[Figures]) -> Figures:
    return {key: median(one[key] for one in made) for key, value in made[0].items() if isinstance(value, int | float)}


def _check_same_work(runs: dict[str, list[Figures]]) -> None:
    first = {system: made[0]["first_loss"] for system, made in runs.items()}
    if max(first.values()) - min(first.values()) > SAME_WORK:
        raise SystemExit(f"not the same work: the losses of the first step are {first}, wanted within {SAME_WORK}")


# ------------------------------------------------------------------------------------------------------------ the shell


def _say(what: str, made: Figures) -> None:
    told = f"{made['tokens_per_second']:8.0f} tokens/s  {made['peak_gib']:5.2f} GiB  loss {made['final_loss']:.3f}"
    print(f"{what:45} {told}", file=sys.stderr, flush=True)


def table(result: Figures) -> str:
    """The medians as a Markdown table."""
    lines = [
        "| system | variant | tokens/s | ours / it | peak GiB | ours / it | whole process s | compile s | final loss |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for system, made in result["median"].items():
        fast, small = (result[key].get(system, {}).get("median") for key in ("ratio", "memory_ratio"))
        cells = [
            *(system, result["variants"][system], f"{made['tokens_per_second']:.0f}", _ratio(fast)),
            *(f"{made['peak_gib']:.2f}", _ratio(small), f"{made['process_seconds']:.0f}"),
            *(f"{made['compile_seconds']:.1f}", f"{made['final_loss']:.3f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    """Run the comparison and write benchmarks/results/cpu_train.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_train", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of each run")
    parser.add_argument("--ours", type=Path, metavar="WORK", help=argparse.SUPPRESS)  # a run's own process
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP or options.rounds < 1:
        parser.error(f"wanted --rounds of at least 1 and --steps above {WARM_UP}, which are not timed")
    if options.ours:
        options.output.write_text(json.dumps(ours(options.ours, options.steps)), encoding="utf-8")
    elif not DATA.is_file():
        print(f"skipped: no data at {DATA.resolve()}; VENEER_DATA names the folder that holds e2e_nlg/train.jsonl")
    else:
        _benchmark(options.rounds, options.steps)


def _load() -> float:
    """Processes that wanted a core in the last minute; OpenMP threads that must share one lose far more than half."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}): these figures will not be fit to quote", file=sys.stderr)
    return load


def _benchmark(rounds: int, steps: int) -> None:
    load = _load()
    with tempfile.TemporaryDirectory(prefix="veneer-bench-") as folder:
        prepare = ["prepare", folder, "--data", str(DATA.resolve()), "--steps", str(steps)]
        command = [sys.executable, "-m", "benchmarks.peers_cpu", *prepare]
        subprocess.run(command, cwd=record.ROOT, env=_environment(), check=True)
        result = {"load_before": load} | compare(Path(folder), rounds, steps)
    path = record.save("cpu_train", result)
    print(table(result))
    print(f"written to {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
