"""What merging two adapters costs: 24 tasks, all 276 pairs: `python -m benchmarks.merge_quality [--seconds 1500]`.

Each task has an adapter of its own on SmolLM2-135M (135M parameters, whose weights were stored in 4 bits once). All
pairs are merged by `linear` with weights of 1 each, as the result comes and at half its scale (weights of 1/2); PAIRS
of them, drawn once, by every other method of METHODS at both scales, by those of ON_ROWS, which read rows that training
held out, and by training one adapter on both tasks' rows. Every score is of the test file, each task's own, see
`benchmarks.multitask`. What is measured of a pair before merging (`features`) stands beside its scores. The file is
written as it grows, and what it holds is not measured again; adapters lie in a folder beside it, for the next call.

Several processes share the work (`benchmarks.parts`): `--adapters-only` first, then a `--part N/M` each, then
`--join` of their outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import multitask, record

PAIRS, SEED = 60, 0
SCALES = {"1/2": 0.5, "1": 1.0}  # of what comes out with weights of 1 each
LINEAR: dict[str, dict[str, Any]] = {"linear": {}}
METHODS: dict[str, dict[str, Any]] = {  # with their options
    "svd": {"rank": multitask.RANK},
    "magnitude": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.7},
    "dare_ties": {"density": 0.7},
    "knots": {"density": 0.5},
    "core": {"density": 0.5},
    "tsv_m": {},
    "iso_c": {},
    "iso_cts": {},
    "orthogonal": {},
    "compress": {"rank": multitask.RANK},
}
ON_ROWS: dict[str, tuple[str, tuple[float, float], dict[str, Any]]] = {  # read the held-out rows of both tasks
    "regmean": ("regmean", (1.0, 1.0), {}),
    "lorahub": ("lorahub", (0.5, 0.5), {}),
    "lora_soups": ("lora_soups", (0.5, 0.5), {}),
    "svd on rows": ("svd", (0.5, 0.5), {"rank": multitask.RANK, "activation_aware": True}),
}
JOINT, JOINED = "joint", "--"
GROUPS = ("base", "alone", "half", "features", "pairs")  # of entries, in the file
Pair = tuple[str, str]


class OutOfTime(Exception):
    """Nothing more is begun."""


def main() -> None:
    """Trains, merges and scores, as far as the time goes, and writes benchmarks/results/merge_quality.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after that")
    parser.add_argument("--adapters", type=Path, default=Path("out/merge-quality"), help="where adapters are kept")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "merge_quality.json")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--adapters-only", action="store_true", help="train those of all tasks and measure nothing")
    parser.add_argument("--part", default="1/1", type=part_of, metavar="N/M", help="the n-th of m parts of all scores")
    parser.add_argument("--join", nargs="+", type=Path, metavar="FILE", help="outputs of parts, into one; nothing else")
    asked = parser.parse_args()
    if asked.join:
        asked.output.write_text(json.dumps(join(asked.join, GROUPS), indent=2) + "\n", encoding="utf-8")
        return
    if not multitask.DATA.is_dir():
        sys.exit(f"no data at {multitask.DATA}; set VENEER_DATA to the folder that holds multitask")
    held = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    if not all("held" in one for one in held.get("base", {}).values()):
        print("what lies there has no scores of held-out rows: all is measured anew", file=sys.stderr)
        held = {}
    until = time.monotonic() + asked.seconds
    experiment = Experiment(asked.tasks or multitask.names(), asked.adapters, held, until, asked.part)
    if asked.adapters_only:
        experiment.alone()
        return
    save = partial(record.save, asked.output.stem, experiment.result, asked.output.resolve().parent)
    try:
        for group in experiment.all():
            save()
            print(group, file=sys.stderr, flush=True)
    except OutOfTime:
        print("out of time; the next call goes on", file=sys.stderr)
    finally:  # a group is long: what was measured of it stays
        save()


def part_of(text: str) -> tuple[int, int]:
    """`2/4` -> (2, 4)."""
    part, count = (int(number) for number in text.split("/"))
    if not 1 <= part <= count:
        raise ValueError(f"wanted 1/{count} to {count}/{count}")
    return part, count


def join(files: Sequence[Path], groups: Sequence[str]) -> dict[str, Any]:
    """These groups of entries of all files, in the order of names; the rest as the first has it."""
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    joined: dict[str, dict[str, Any]] = {name: {} for name in groups}
    for one in parts:
        for name, group in joined.items():
            for entry, found in one.get(name, {}).items():
                group[entry] = group.get(entry, {}) | found
    return parts[0] | {name: dict(sorted(group.items())) for name, group in joined.items()}


class Experiment:
    """Adapters, scores so far, and what comes next; `part`: of all scores, the n-th of so many parts."""

    def __init__(
        self, tasks: list[str], folder: Path, held: dict[str, Any], until: float, part: tuple[int, int] = (1, 1)
    ) -> None:
        from veneer.model.load import load

        self.tasks, self.folder, self.until = tasks, folder, until
        self.loaded = load("smollm2", progress=False)
        self.tests = {task: multitask.Test(self.loaded, task) for task in tasks}
        self.held = {task: multitask.Test(self.loaded, task, "held") for task in tasks}
        self.pairs: list[Pair] = list(combinations(tasks, 2))
        self.drawn = sorted(random.Random(SEED).sample(self.pairs, min(PAIRS, len(self.pairs))))
        self.first, self.every = part[0] - 1, part[1]
        self.result: dict[str, Any] = {name: held.get(name, {}) for name in GROUPS}
        self.adapters: dict[str, Any] = {}

    def all(self) -> Iterator[str]:
        """Everything, in parts that can be written."""
        mine = slice(self.first, None, self.every)
        tasks, drawn, pairs = self.tasks[mine], self.drawn[mine], self.pairs[mine]
        self.each(tasks, self.result["base"], lambda task: self.scores([task], None)[task])
        yield "base"
        self.adapters = self.alone()
        self.each(tasks, self.result["alone"], lambda task: self.score(self.adapters[task], self.tasks))
        yield "alone"
        self.each(tasks, self.result["half"], lambda task: self.score(scaled(self.adapters[task], 0.5), [task]))
        yield "half"
        if self.first == 0:
            self.result["features"] = self.measured()
            yield "features"
        yield from self.merged(LINEAR, drawn)
        yield from self.merged(METHODS, drawn)
        yield from self.merged(LINEAR, pairs)
        joint = self.made({key(pair): pair for pair in drawn})
        for pair in drawn:
            if JOINT not in self.entry(pair):
                self.entry(pair)[JOINT] = self.score(joint[key(pair)], pair)
        yield JOINT
        yield from self.merged_on_rows(drawn)

    def alone(self) -> dict[str, Any]:
        """The adapter of each task."""
        return self.made({task: (task,) for task in self.tasks})

    def measured(self) -> dict[str, Any]:
        """What `veneer inspect` measures of every pair, without data."""
        from veneer.measure.figures import measure

        found = measure([self.adapters[task] for task in self.tasks], multitask.RANK)
        return {key(pair): asdict(one) for pair, one in zip(self.pairs, found.pairs, strict=True)}

    def merged(self, methods: dict[str, Any], pairs: list[Pair]) -> Iterator[str]:
        """Every pair by every method with each of SCALES; merged by a process for every two cores, scored here."""
        workers = max(1, (os.cpu_count() or 1) // 2 // self.every)
        pool = ProcessPoolExecutor(workers, get_context("spawn"), begin, (self.folder,))
        try:
            for name in methods:
                left = [(name, pair) for pair in pairs if not self.entry(pair).keys() >= at_scales(name).keys()]
                for (_, pair), made in zip(left, pool.map(merge, left), strict=True):  # merged ahead of being scored
                    self.check_time()
                    adapter, kept = pickle.loads(made)
                    for label, scale in at_scales(name).items():
                        self.entry(pair)[label] = self.score(scaled(adapter, scale), pair) | {"kept": kept}
                yield name
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def merged_on_rows(self, pairs: list[Pair]) -> Iterator[str]:
        """Every pair by the methods that read rows, of the 30 of each task that chose its adapter's best step; of a row
        with several right answers, all."""
        from veneer.merge.apply import combine
        from veneer.merge.recipe import Recipe

        for name, (method, weights, options) in ON_ROWS.items():
            for pair in pairs:
                if name not in self.entry(pair):
                    self.check_time()
                    adapters = [self.adapters[task] for task in pair]
                    with self.on_base(pair) as parents:
                        adapter, report = combine(adapters, Recipe(method, weights, options), False, None, parents)
                    learned = {what: value for what, value in report.learned.items() if not isinstance(value, Mapping)}
                    self.entry(pair)[name] = self.score(adapter, pair) | {"kept": report.kept, "learned": learned}
            yield name

    @contextmanager
    def on_base(self, pair: Pair) -> Iterator[Any]:
        """Both adapters on the base, in slots of their tasks' names."""
        from veneer.adapter.attach import attach, detach
        from veneer.merge.on_base import OnBase

        for task in pair:
            attach(self.loaded.model, self.adapters[task], task)
        yield OnBase(self.loaded, pair, {task: self.held[task].examples for task in pair})
        for task in pair:
            detach(self.loaded.model, task)

    def entry(self, pair: Pair) -> dict[str, Any]:
        return self.result["pairs"].setdefault(key(pair), {})

    def each(self, what: list[str], found: dict[str, Any], make: Callable[[str], Any]) -> None:
        for name in what:
            if name not in found:
                self.check_time()
                found[name] = make(name)

    def check_time(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    def score(self, adapter: Any, tasks: Sequence[str]) -> dict[str, Any]:
        """Score and loss of these tasks with the adapter on: of the test rows, and of those held out of training."""
        from veneer.adapter.attach import attach, detach

        attach(self.loaded.model, adapter, "scored")
        found = self.scores(tasks, "scored")
        detach(self.loaded.model, "scored")
        return found

    def scores(self, tasks: Sequence[str], slot: str | None) -> dict[str, Any]:
        """Of what `slot` makes of each task's test rows, and of those held out of training."""
        tests = [part[task] for task in tasks for part in (self.tests, self.held)]
        found = multitask.scores(self.loaded, slot, tests)
        return {task: of | {"held": held} for task, of, held in zip(tasks, found[::2], found[1::2], strict=True)}

    def made(self, wanted: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        """Adapters trained on these tasks' rows, from the folder where they lie there."""
        from veneer.adapter.card import Adapter

        missing = {name: tasks for name, tasks in wanted.items() if not (self.folder / name).is_dir()}
        if missing:
            self.check_time()
            sets = {name: mixed(tasks) for name, tasks in missing.items()}
            for name, adapter in multitask.trained(self.loaded, sets, SEED).items():
                adapter.save(self.folder / name)
        return {name: Adapter.load(self.folder / name) for name in wanted}


HELD: dict[str, Any] = {}  # of a process that merges: the adapters of all tasks


def begin(folder: Path) -> None:
    """What a process that merges starts with."""
    import torch

    from veneer.adapter.card import Adapter

    torch.set_num_threads(1)
    HELD.update({path.name: Adapter.load(path) for path in folder.iterdir() if JOINED not in path.name})


def merge(what: tuple[str, Pair]) -> bytes:
    """A pair by a method with weights of 1, and the kept share of its update; as bytes, since a tensor would travel as
    an open file."""
    from veneer.merge.apply import combine
    from veneer.merge.recipe import Recipe

    method, pair = what
    recipe = Recipe(method, (1.0, 1.0), (LINEAR | METHODS)[method])
    merged, report = combine([HELD[task] for task in pair], recipe, progress=False)
    return pickle.dumps((merged, report.kept))


def at_scales(name: str) -> dict[str, float]:
    """What is scored of a method: `linear` -> {`linear 1/2`: 0.5, `linear 1`: 1.0}."""
    return {f"{name} {label}": scale for label, scale in SCALES.items()}


def scaled(adapter: Any, scale: float) -> Any:
    """A share of an adapter's update; of a merge, what `--scale` gives."""
    from veneer.adapter.card import Adapter

    tensors = {name: scale * tensor if name.endswith(".b") else tensor for name, tensor in adapter.tensors.items()}
    return Adapter(tensors, adapter.card)


def key(pair: Pair) -> str:
    return JOINED.join(pair)


def mixed(tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """The training rows of the tasks in turns, so that the first, which are held out, are of each."""
    each = [multitask.rows(task, "train") for task in tasks]
    return [row for together in zip(*each, strict=False) for row in together]


if __name__ == "__main__":
    main()
