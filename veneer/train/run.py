"""One training run: files in, adapter folder out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from veneer.adapter.attach import methods_of
from veneer.adapter.take import take
from veneer.config import RunConfig, write_yaml
from veneer.model.layers import as_they_were
from veneer.model.load import Loaded
from veneer.model.swap import base_at
from veneer.places import check_folder
from veneer.train import checkpoint
from veneer.train.fit import fit
from veneer.train.job import Job
from veneer.train.loop import loop
from veneer.train.prepare import SLOT, current, prepare
from veneer.train.ranks import Ranks, joined
from veneer.train.record import Recorder, machine, peak_memory_bytes
from veneer.train.rows import TrainingData
from veneer.train.schedule import Rate
from veneer.train.shard import gathered
from veneer.train.trackers import Tracking

# Options that may change between a run and its resumption: they do not touch a single byte of the adapter,
FREE = (
    "output_dir",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "gradient_checkpointing",
    "fsdp",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "report_to",
    "run_name",
    "project_name",
)
# or, as long as their product is the same, only the rounding of its sums.
PASSES = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run did; `to_json` is what `veneer train --json` prints."""

    output_dir: str
    steps: int
    train_seconds: float
    tokens: int
    tokens_per_second: float
    trainable_parameters: int
    final_loss: float
    eval_loss_before: float | None
    best_eval_loss: float | None
    best_step: int
    learning_rate: float
    peak_memory_bytes: int
    warnings: tuple[str, ...]  # settings that are known to hurt
    notes: tuple[str, ...]
    orthogonal_to: dict[str, Any] | None = None  # where asked for: earlier adapters, and the overlap with them

    def to_json(self) -> dict[str, Any]:
        told = {**dataclasses.asdict(self), "warnings": list(self.warnings), "notes": list(self.notes)}
        return {name: fact for name, fact in told.items() if name != "orthogonal_to" or fact}


def train(
    config: RunConfig, *, resume: bool = False, progress: bool = True, loaded: Loaded | None = None
) -> TrainResult:
    """Trains one adapter and writes its folder; `loaded` spares loading the base again.

    With `resume`, goes on from the last checkpoint in output_dir, to the same bytes as an undisturbed run. Under
    torchrun all processes call it, each with an equal config; the first one prints and writes.
    Raises ConfigError, DataError, ModelError, TrainingError and its kin; the folder is whole or untouched.
    """
    with joined() as ranks:
        return _train(config, resume, progress and ranks.is_main, loaded, ranks)


def _train(config: RunConfig, resume: bool, progress: bool, loaded: Loaded | None, ranks: Ranks) -> TrainResult:
    say = Console(stderr=True, highlight=False, quiet=not progress).print
    output = Path(config.output_dir)
    check_folder("--output-dir", output)
    loaded, data, job, rate, notes, warnings = prepare(config, ranks, loaded, progress)
    identity = _identity(config, loaded, rate, data, job)
    notes += _start(output, config, [job], identity, resume, ranks)
    for warning in warnings:
        say(f"warning: {warning}")
    for note in notes:
        say(f"note: {note}")

    def save(jobs: Sequence[Job]) -> None:
        if ranks.is_main:
            checkpoint.save(output, jobs, identity, config.train.save_total_limit, ranks.world)

    try:
        with current(job.flat.values_P.device):
            graphs, fitted = fit(loaded.model, job, config.train, ranks)
            for note in fitted:
                say(f"note: {note}")
            with (
                Tracking(config, job.step, ranks.is_main) as tracking,
                Recorder(output, [job], progress, ranks.is_main, tracking) as record,
            ):
                loop(loaded.model, [job], record=record, save=save, ranks=ranks, graphs=graphs)
    finally:
        as_they_were(loaded.model)
    notes += fitted
    verdict = _verdict(job)
    for note in verdict:
        say(f"note: {note}")
    notes += verdict
    result = _result(config, job, warnings, notes)
    facts = {
        "options": config.to_flat(),
        "data": data.facts(),
        "machine": machine(),
        "update_norms": update_norms(loaded.model),
    }
    training = {**result.to_json(), **facts}
    adapter = take(loaded.model, SLOT, base_name=config.base_model, storage=loaded.storage, training=training)
    if ranks.is_main:
        adapter.save(output)
    ranks.barrier()  # so that every process finds the adapter written
    return result


def _identity(config: RunConfig, loaded: Loaded, rate: Rate, data: TrainingData, job: Job) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's."""
    options = {name: value for name, value in config.to_flat().items() if name not in (*FREE, *PASSES)}
    hashes = {"data_sha256": data.sha256, "eval_data_sha256": data.eval_sha256}
    facts = {"rate": rate.value, **hashes, "storage": loaded.storage}
    earlier = job.orthogonality.about["adapters"] if job.orthogonality else []
    facts["orthogonal_to"] = [one["identity"] for one in earlier]  # wherever they lie now
    facts["orthogonal_data"] = [one["data_sha256"] for one in earlier if "data_sha256" in one]
    rows = math.prod(getattr(config.train, name) for name in PASSES)
    return {
        **options,
        **facts,
        f"rows in a step, {' x '.join(PASSES)}": rows,
        "base_weights": loaded.fingerprint.weights,
    }


def _start(
    output: Path, config: RunConfig, jobs: list[Job], identity: dict[str, Any], resume: bool, ranks: Ranks
) -> list[str]:
    """Restores the jobs and prepares the output folder; returns notes."""
    notes = []
    if resume:
        found = checkpoint.latest(output)
        notes += [f"resumed from {found}"] if found else [f"nothing to resume in {output}: starting from the beginning"]
        notes += checkpoint.restore(found, jobs, identity, ranks.world, _defaults()) if found else []
    ranks.barrier()  # all have read before one writes
    if not ranks.is_main:
        return notes
    if not resume and (output / "run.yaml").exists():
        notes.append(f"the earlier run in {output} was moved to {_set_aside(output)}")
    output.mkdir(parents=True, exist_ok=True)
    write_yaml(output / "run.yaml", config.to_flat())
    return notes


def _defaults() -> dict[str, Any]:
    """What every option was before it existed."""
    return RunConfig.from_flat({"base_model": "-", "dataset": "-", "output_dir": "-"}).to_flat()


def _set_aside(output: Path) -> Path:
    """Moves an earlier run out of the way: nothing is lost."""
    number = 1
    while (aside := output.with_name(f"{output.name}.old-{number}")).exists():
        number += 1
    return output.rename(aside)


def update_norms(model: nn.Module, slot: str = SLOT) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ (Frobenius) of every adapted layer: where the adapter changed the model, and how much."""
    norms = {}
    for path, method in methods_of(model, slot).items():
        with gathered(model, path):
            base = base_at(model, path)
            norms[path] = float(f"{method.update_norm(base) / torch.linalg.vector_norm(base.row_norms()).item():.4g}")
    return norms


def _verdict(job: Job) -> list[str]:
    """What a user should know about how the run ended."""
    notes = []
    if job.stopped_early:
        notes.append(
            f"stopped early at step {job.step} of {job.total}: no better validation loss since step {job.best_step}"
        )
    if job.scale is not None and (scaling := job.scale.read()).skipped:
        notes.append(
            f"{scaling.skipped} steps were skipped for gradients beyond float16; the loss scale is {scaling.scale:g}"
        )
    if job.orthogonality is not None:
        overlap = job.orthogonality.facts()["overlap"]
        notes.append(
            f"of A, {overlap['at_start']:.2%} lay in what the earlier adapters read at the start, "
            f"{overlap['at_end']:.2%} does now ({overlap['of_random_factors']:.2%} of random factors)"
        )
    if job.best_P is not None and job.best_step < job.step:
        notes.append(
            f"kept the adapter of step {job.best_step}, validation loss {job.best_loss:.4f}; later steps were worse"
        )
    if job.best_P is not None and job.best_step == 0:
        notes.append(
            "validation never beat the untrained adapter: this one does nothing. Look at the data and the learning rate"
        )
    return notes


def _result(config: RunConfig, job: Job, warnings: list[str], notes: list[str]) -> TrainResult:
    validated = [line["loss"] for line in job.history if line["split"] == "eval"]
    return TrainResult(
        output_dir=config.output_dir,
        steps=job.step,
        train_seconds=round(job.seconds, 3),
        tokens=job.tokens,
        tokens_per_second=round(job.tokens / job.seconds, 1) if job.seconds else 0.0,
        trainable_parameters=len(job.flat),
        final_loss=job.last_loss,
        eval_loss_before=validated[0] if validated else None,
        best_eval_loss=job.best_loss if math.isfinite(job.best_loss) else None,
        best_step=job.best_step,
        learning_rate=job.learning_rate,
        peak_memory_bytes=peak_memory_bytes(job.flat.values_P.device),
        warnings=tuple(warnings),
        notes=tuple(notes),
        orthogonal_to=job.orthogonality.facts() if job.orthogonality else None,
    )
