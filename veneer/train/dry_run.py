"""What a run would take, measured: some of its steps, the largest among them, are taken at rate 0 and thrown away.

The process then has loaded what the run will load and held what the run will hold at its most, so its peak is the
run's. What a model of the memory would have to know of allocators, of storages that decode, of recompute and of
libraries is in it already.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.bases.base import Base
from veneer.config import RunConfig
from veneer.data.examples import Unit
from veneer.model.layers import as_they_were
from veneer.model.losses import STREAM, streams_of
from veneer.train import checkpoint
from veneer.train.feed import Feed
from veneer.train.fit import fit, largest
from veneer.train.job import Job
from veneer.train.loop import raise_failures, validate
from veneer.train.memory import memory_explained
from veneer.train.passes import Passes
from veneer.train.prepare import current, prepare
from veneer.train.ranks import Ranks, joined
from veneer.train.record import peak_memory_bytes
from veneer.train.step import StepReader, begin_step

TIMED = 4  # steps, after one that warms up
GROWTH = 0.1  # of the peak, that runs of 10 to 60 steps held more on a CPU (5 to 16 %: docs/log.md)
PATIENCE = 60.0  # seconds of steps, after which no other is begun to be timed


class Pace(NamedTuple):
    """Seconds a token, of each step that was timed, and of validation (0 without)."""

    steps: list[float]
    validation: float


def dry_run(config: RunConfig, *, progress: bool = False) -> dict[str, Any]:
    """What `train` would do and take. Loads the base and computes a few steps; writes nothing.

    `peak_memory_bytes` is what `TrainResult` calls so. Raises as `train` does, NotEnoughMemoryError among it.
    """
    with joined() as ranks:
        loaded, data, job, rate, notes, warnings = prepare(config, ranks, None, progress and ranks.is_main)
        device = job.flat.values_P.device
        with current(device):
            try:
                graphs, fitted = fit(loaded.model, job, config.train, ranks)
                with memory_explained(loaded.model, [job], ranks):
                    pace = _trial(loaded.model, job, ranks, graphs)
            finally:
                as_they_were(loaded.model)
        weights = base_parameters(loaded.model)
        return {
            **data.facts(),
            "steps": job.total,
            "tokens_of_the_run": tokens_of_run(job),
            "learning_rate": rate.value,
            "learning_rate_why": rate.reason,
            "trainable_parameters": len(job.flat),
            "base_parameters": weights,
            "trainable_percent": float(f"{100 * len(job.flat) / weights:.3g}"),
            "peak_memory_bytes": round(peak_memory_bytes(device) * (1 + _growth(device))),
            "peak_memory_from": _memory_source(len(pace.steps), device),
            **seconds_of_run(job, pace),
            "options": config.to_flat(),
            "warnings": warnings,
            "notes": [*notes, *fitted],
        }


def _trial(model: nn.Module, job: Job, ranks: Ranks, graphs: bool) -> Pace:
    """Does what the run will do, a little of each: validates, takes its first steps, writes a checkpoint (elsewhere),
    and takes the step of the largest pass.

    On the CPU the order matters. Memory that differing sizes and checkpoints have broken into pieces is not all used
    again at once, so the largest pass alone would hold less than the run does (docs/log.md).
    """
    told: list[dict[str, Any]] = []
    trial = Trial(model, job, Feed(Passes(model, graphs), ranks), told)
    most, _ = largest(job)
    job.learning_rate = 0.0
    trial.validation(ranks)
    begun, steps = time.perf_counter(), [trial.step(0)]
    while len(steps) < 2 or (len(steps) <= TIMED and not _late(begun, job, ranks)):
        steps.append(trial.step(len(steps)))
    for _ in range(2):
        trial.save(ranks)
        trial.step(most)
    return Pace(steps[1:], trial.validation(ranks))


class Trial(NamedTuple):
    """A job whose steps are taken in any order."""

    model: nn.Module
    job: Job
    feed: Feed
    told: list[dict[str, Any]]

    def _record(self, job: Job, facts: dict[str, Any]) -> None:
        self.told.append(facts)

    def step(self, number: int) -> float:
        """Takes a step (from 0; of a short run the last ones come again); its seconds a token."""
        self.job.step = number % self.job.total
        reader = StepReader(self._record)
        reader.push(begin_step(self.feed, [self.job]))
        reader.flush()
        raise_failures([self.job])
        return self.told[-1]["seconds"] / self.told[-1]["tokens"]

    def save(self, ranks: Ranks) -> None:
        """Writes a checkpoint that nobody keeps."""
        if ranks.is_main:
            with TemporaryDirectory() as folder:
                checkpoint.save(Path(folder), [self.job], {}, None, ranks.world)

    def validation(self, ranks: Ranks) -> float:
        """Validates on as many rows as the run holds at once; its seconds a token, 0 without rows."""
        whole = self.job.validation
        if not whole:
            return 0.0
        self.job.validation = max(streams_of(whole, STREAM * ranks.world), key=_tokens)
        validate(self.model, self.job, self._record, ranks)
        seconds = self.told[-1]["seconds"] / _tokens(self.job.validation)
        self.job.validation = whole
        return seconds


def _late(begun: float, job: Job, ranks: Ranks) -> bool:
    """Whether the steps have taken long enough, for all processes alike."""
    late = torch.tensor(float(time.perf_counter() - begun > PATIENCE), device=job.flat.values_P.device)
    return bool(ranks.sum_(late) > 0)


def seconds_of_run(job: Job, pace: Pace) -> dict[str, Any]:
    """Of all steps (and between what it lies if all go as the fastest or as the slowest), and of all validations."""
    tokens = tokens_of_run(job)
    return {
        "train_seconds": round(tokens * mean(pace.steps), 1),
        "train_seconds_between": [round(tokens * min(pace.steps), 1), round(tokens * max(pace.steps), 1)],
        "validation_seconds": round(validations(job) * _tokens(job.validation) * pace.validation, 1),
        "seconds_from": f"{len(pace.steps)} timed steps and a part of the validation, by their tokens; loading, "
        "checkpoints and report come on top",
    }


def validations(job: Job) -> int:
    """How often a whole run validates: before its first step, every eval_steps, and after the last."""
    if not job.validation:
        return 0
    return 1 + job.total // job.eval_steps + bool(job.total % job.eval_steps)


def tokens_of_run(job: Job) -> int:
    """Tokens that all steps go through."""
    lengths = [len(example.input_ids) for example in job.train]
    return sum(lengths[row] for step in range(job.total) for row in job.batches.rows(step))


def base_parameters(model: nn.Module) -> int:
    """Numbers that the base consists of, however they are stored; what several modules share counts once."""
    bases = [module for module in model.modules() if isinstance(module, Base)]
    packed = {id(parameter) for base in bases for parameter in base.parameters()}
    others = {id(p): p.numel() for p in model.parameters() if not p.requires_grad and id(p) not in packed}
    biases = sum(base.out_features for base in bases if base.bias is not None)
    weights = {id(base.weight): base.out_features * base.in_features for base in bases}  # a tied head's is no second
    return sum(weights.values()) + biases + sum(others.values())


def _tokens(examples: Sequence[Unit]) -> int:
    return sum(len(example.input_ids) for example in examples)


def _growth(device: torch.device) -> float:
    """What is added to the peak, for pieces and caches that come with steps of other sizes."""
    return GROWTH if device.type == "cpu" else 0.0


def _memory_source(steps: int, device: torch.device) -> str:
    """How the peak was found, and how far it is to be trusted."""
    done = f"measured: loading, validation, {steps + 1} steps, a checkpoint, the step of the largest pass"
    if device.type == "cpu":
        return f"{done}; resident memory of this process, and {GROWTH:.0%} for what it grows by in a longer run"
    return f"{done}; the allocator's peak, not verified on a GPU"
