"""Training on one GPU: ours beside PEFT, Liger, QLoRA and Unsloth, on the same work. `python -m benchmarks.gpu_train`.

    python -m benchmarks.gpu_train --rows 8b-bf16 --systems ours,unsloth --rounds 3 --seconds 500

Random weights, the same for every system; the same synthetic tokens; float32 adapters and moments. Each run is a
process of its own. A scan of a few steps picks each system's best of its variants (batch, recompute, compiling), then
rounds of all systems, interleaved, measure. Results are merged into benchmarks/results/gpu_train.json row by row, each
with its commit, date and GPU, so that several calls fill one file. Packages of the peers may lie in a folder of their
own: VENEER_BENCH_PEERS names it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import gpu_longest, gpu_process, gpu_sweep, record
from benchmarks.gpu_meter import WARM_UP
from benchmarks.gpu_process import Result, worked
from benchmarks.gpu_rows import LONGEST, ROWS, SYSTEMS, Row, parse_rows, parse_systems
from benchmarks.gpu_spec import Spec
from benchmarks.gpu_sweep import Clock, Run, Runs
from benchmarks.gpu_table import longest_lines, outcome, page, table

NAME = "gpu_train"
File = dict[str, Any]


def main() -> None:
    """Run rows and write the file after each."""
    options = _options()
    held = load(options.output)
    save = saver(held, options.output)
    if options.gather:
        gather(held, [load(path) for path in options.gather])
        save()
        return
    if options.show:
        print(page(held))
        return
    clock = Clock(options.seconds)
    gpu = record.gpu()
    if gpu is None:
        print("skipped: no CUDA device")
        return
    if not options.keep_ceiling or held.get("ceiling", {}).get("gpu") != gpu:
        held["ceiling"] = stamp() | gpu_process.read(["-m", "benchmarks.gpu_ceiling"])
        save()
    for name in options.rows:
        if name in LONGEST:
            row = LONGEST[name]
            caps = options.caps or row.caps_gib
            for found in gpu_longest.longest(row.spec, caps, run_and_say, row.steps, row.most):
                held.setdefault("longest", {})[name] = stamp() | found
                save()
            said = longest_lines(held["longest"][name])
        else:
            measure(held, name, options, clock, save, run_and_say)
            said = table(name, held["rows"][name])
        save()
        print(said, flush=True)


def measure(
    held: File, name: str, options: argparse.Namespace, clock: Clock, save: Callable[[], None], run: Run
) -> None:
    """One row: scan, rounds, entry; what other systems hold there stays."""
    row = ROWS[name]
    systems = [system for system in row.systems if options.systems is None or system in options.systems]
    for shape in {row.shape for system in systems if "unsloth" in system}:
        _checkpoint(shape)
    known = {system: known_trials(held, name, system) if options.reuse else [] for system in systems}
    trials = gpu_sweep.scan(row, known, run, clock)
    ceiling = held.get("ceiling")
    ceiling = ceiling if ceiling and "bf16_tflops" in ceiling else None
    picked = gpu_sweep.chosen(row, trials)
    merge(held, name, {s: _scanned(trials[s], row, s) for s in systems if s not in picked}, {})
    merge(held, name, {s: gpu_sweep.entry(spec, trials[s], [], None) for s, spec in picked.items()}, {})
    save()

    def keep(runs: Runs) -> None:
        entries = {s: gpu_sweep.entry(picked[s], trials[s], made, ceiling) for s, made in runs.items()}
        merge(held, name, entries, gpu_sweep.ratios(runs))
        save()

    gpu_sweep.rounds(picked, options.rounds, options.steps, run, clock, keep)


def gather(held: File, others: Sequence[File]) -> None:
    """Puts what other files hold into this one: rows measured at once, each on a GPU of its own."""
    for other in others:
        for name, row in other.get("rows", {}).items():
            here = held.setdefault("rows", {}).setdefault(name, {"systems": {}, "ratios": {}})
            for system, entry in row["systems"].items():
                put(here, system, entry)
            for ours, peers in row["ratios"].items():
                here["ratios"].setdefault(ours, {}).update(peers)
        held.setdefault("longest", {}).update(other.get("longest", {}))
        held |= {name: other[name] for name in ("ceiling",) if name in other}


def _scanned(trials: list[Result], row: Row, system: str) -> dict[str, Any]:
    """Of a system of which no variant worked."""
    return {"trials": trials, "spec": row.candidates(system, 0)[0].__dict__}


def known_trials(held: File, name: str, system: str) -> list[Result]:
    """What the file holds of a system's variants, those aside for which there was no time."""
    tried = held.get("rows", {}).get(name, {}).get("systems", {}).get(system, {}).get("trials", [])
    return [made for made in tried if made.get("failed") != gpu_sweep.NO_TIME]


def merge(held: File, name: str, entries: dict[str, dict[str, Any]], ratios: dict[str, Any]) -> None:
    """Puts entries and ratios into the row; others stay."""
    row = held.setdefault("rows", {}).setdefault(name, {"systems": {}, "ratios": {}})
    for system, entry in entries.items():
        put(row, system, stamp() | entry)
    for ours, peers in ratios.items():
        for peer, ratio in peers.items():
            row["ratios"].setdefault(ours, {})[peer] = stamp() | ratio


def put(row: dict[str, Any], system: str, entry: dict[str, Any]) -> None:
    """Into the row, unless it was not measured and what stands there was."""
    if worked(entry) or not worked(row["systems"].get(system, {})):
        row["systems"][system] = entry


def _checkpoint(shape: str) -> None:
    """Written in a process of its own, so that this one never touches the device."""
    print(f"checkpoint {shape}: {gpu_process.read(['-m', 'benchmarks.peers_checkpoint', shape])}", file=sys.stderr)


def run_and_say(spec: Spec) -> Result:
    made = gpu_process.run(spec)
    rows, compiled = f"{spec.batch // spec.passes}x{spec.passes}", "compiled" * spec.compile
    said = f"{spec.system:17} {spec.shape} {spec.storage} {rows} {spec.recompute} {compiled}"
    print(f"{said:55} {outcome(made)}", file=sys.stderr, flush=True)
    return made


def stamp() -> dict[str, Any]:
    """What every part of the file carries, since parts come from several calls."""
    return {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), **record.commit(), "gpu": record.gpu()}


def load(path: Path) -> File:
    """What earlier calls wrote, without their provenance at the top; empty where there is no file."""
    if not path.is_file():
        return {}
    held = json.loads(path.read_text(encoding="utf-8"))
    return {name: held[name] for name in ("ceiling", "rows", "longest") if name in held}


def saver(held: File, path: Path) -> Callable[[], None]:
    """Writes the file as it stands; called often, since a call may be cut off at any moment."""

    def save() -> None:
        record.save(path.stem, held, path.resolve().parent)

    return save


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_train", description=__doc__.partition("\n")[0])
    known = ", ".join([*ROWS, *LONGEST])
    parser.add_argument("--rows", type=parse_rows, default="all", help=f"all, or some of {known}, by commas")
    parser.add_argument("--systems", type=parse_systems, help=f"only these of a row's: {', '.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; 0 only scans")
    parser.add_argument("--steps", type=int, default=20, help=f"optimiser steps of a measured run; {WARM_UP} warm up")
    parser.add_argument("--seconds", type=float, help="begin nothing that would end later than this")
    parser.add_argument("--reuse", action="store_true", help="try no variant again that the file holds")
    parser.add_argument("--keep-ceiling", action="store_true", help="no new ceiling where the file holds this GPU's")
    parser.add_argument("--caps", type=_caps, help="limits in GiB for the longest sequences")
    parser.add_argument("--output", type=Path, default=record.RESULTS / f"{NAME}.json", help="file to merge into")
    parser.add_argument("--show", action="store_true", help="measure nothing; print the file as docs/gpu.md has it")
    parser.add_argument("--gather", type=Path, nargs="+", metavar="FILE", help="measure nothing; merge these files")
    options = parser.parse_args()
    if options.steps <= WARM_UP or options.rounds < 0:
        parser.error(f"wanted --steps above {WARM_UP} and --rounds of at least 0")
    return options


def _caps(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
