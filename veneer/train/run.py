"""One training run: files in, adapter folder out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from veneer.adapter.attach import attach, methods_of, take
from veneer.config import RunConfig, write_yaml
from veneer.errors import ConfigError
from veneer.model.layers import as_they_were
from veneer.model.load import Loaded, load, load_config, load_tokenizer
from veneer.model.quantised import Way, check_way
from veneer.train import checkpoint
from veneer.train.allocator import growing_segments, keep_freed_memory
from veneer.train.fit import fit
from veneer.train.job import Job, total_steps
from veneer.train.loop import loop
from veneer.train.optim import check_optimizer
from veneer.train.ranks import Ranks, joined
from veneer.train.record import Recorder, machine, peak_memory_bytes
from veneer.train.rows import TrainingData, read_data
from veneer.train.schedule import Rate, choose_rate
from veneer.train.shard import check_shardable, gathered, shard

SLOT = "default"
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
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


def plan(config: RunConfig) -> dict[str, Any]:
    """What `train` would do, without loading weights."""
    _check_machine(config)
    data = read_data(config, load_tokenizer(config.base_model))
    steps = total_steps(config.train, len(data.train))
    rate = choose_rate(config.train, config.lora, load_config(config.base_model), steps)
    facts = {**data.facts(), "steps": steps, "learning_rate": rate.value, "learning_rate_why": rate.reason}
    return {**facts, "options": config.to_flat(), "notes": list(data.notes)}


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
    keep_freed_memory()
    growing_segments()
    _check_machine(config)
    check_shardable(config.train.fsdp, ranks)
    if config.train.optimizer_in_bwd and ranks.world > 1:
        raise ConfigError("--optimizer-in-bwd updates before gradients could be summed over processes; leave it out")
    say = Console(stderr=True, highlight=False, quiet=not progress).print
    output, notes = Path(config.output_dir), []
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output-dir {output} is a file; name a folder")
    tokenizer = loaded.tokenizer if loaded else load_tokenizer(config.base_model)
    data = read_data(config, tokenizer)  # before the weights: a fault in the data shows at once
    dtype, device = _place(config)
    loaded = loaded or load(
        config.base_model, dtype, device, tokenizer=tokenizer, storage=config.storage, progress=progress
    )
    attach(loaded.model, config.lora, SLOT, seed=config.train.seed)
    if config.train.fsdp:
        shard(loaded.model, ranks)
    _check_recompute(loaded.model, config.train.gradient_checkpointing)
    steps = total_steps(config.train, len(data.train))
    rate = choose_rate(config.train, config.lora, loaded.model.config, steps)
    job = Job(SLOT, config.train, data.train, data.validation, rate.value, methods_of(loaded.model, SLOT))
    identity = _identity(config, loaded, rate, data)
    notes += [*data.notes, f"learning rate {rate.value:g}: {rate.reason}"]
    notes += [
        *_slow_storage(loaded.model, loaded),
        *_sharing(job, ranks),
        *_start(output, config, [job], identity, resume, ranks),
    ]
    for note in notes:
        say(f"note: {note}")

    def save(jobs: Sequence[Job]) -> None:
        if ranks.is_main:
            checkpoint.save(output, jobs, identity, config.train.save_total_limit, ranks.world)

    try:
        with _current(job.flat.values_P.device):
            graphs, fitted = fit(loaded.model, job, config.train, ranks)
            for note in fitted:
                say(f"note: {note}")
            with Recorder(output, [job], progress, ranks.is_main) as record:
                loop(loaded.model, [job], record=record, save=save, ranks=ranks, graphs=graphs)
    finally:
        as_they_were(loaded.model)
    notes += fitted
    notes += _verdict(job)
    result = _result(config, job, notes)
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


def _current(device: torch.device) -> AbstractContextManager:
    """Inside, what asks for the current GPU (its memory, its streams) means this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_machine(config: RunConfig) -> None:
    """Raises ConfigError or ModelError where this machine lacks what the options ask for."""
    check_optimizer(config.train.optim)
    on_gpu = torch.cuda.is_available()
    if config.storage == "fp8" and config.train.fsdp:
        raise ConfigError("--load-in-fp8 is not shared out by --fsdp; next: --load-in-8bit, or leave --fsdp out")
    if config.lora.method == "dora" and config.train.fsdp:
        raise ConfigError("--method dora asks for whole rows of the base, and --fsdp shares them out; leave one out")
    check_way(Way(config.storage, torch.bfloat16, torch.device("cuda" if on_gpu else "cpu")))
    if config.train.gradient_checkpointing == "offload" and not on_gpu:
        raise ConfigError(
            "--gradient-checkpointing offload moves what a GPU holds to the host, and torch sees no GPU; "
            "next: --gradient-checkpointing"
        )


def _slow_storage(model: PreTrainedModel, loaded: Loaded) -> list[str]:
    if model.device.type != "cpu" or loaded.storage.startswith("dense"):
        return []
    return [
        f"the base is stored as {loaded.storage} and decoded for every product: on a CPU that saves memory and takes "
        "several times as long"
    ]


def _check_recompute(model: PreTrainedModel, wanted: bool | str) -> None:
    dropouts = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if wanted in (True, "offload") and dropouts:
        raise ConfigError(f"--gradient-checkpointing: this base has dropout of its own ({', '.join(dropouts[:3])})")


def _identity(config: RunConfig, loaded: Loaded, rate: Rate, data: TrainingData) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's."""
    options = {name: value for name, value in config.to_flat().items() if name not in (*FREE, *PASSES)}
    hashes = {"data_sha256": data.sha256, "eval_data_sha256": data.eval_sha256}
    facts = {"rate": rate.value, **hashes, "storage": loaded.storage}
    rows = math.prod(getattr(config.train, name) for name in PASSES)
    return {
        **options,
        **facts,
        f"rows in a step, {' x '.join(PASSES)}": rows,
        "base_weights": loaded.fingerprint.weights,
    }


def _place(config: RunConfig) -> tuple[str, str]:
    """In what dtype and where to load. A base to share out is too large for one GPU: it comes by way of the CPU."""
    if not (config.train.fsdp and torch.cuda.is_available()):
        return config.dtype, "auto"
    return "bfloat16" if config.dtype == "auto" else config.dtype, "cpu"


def _sharing(job: Job, ranks: Ranks) -> list[str]:
    """What a user should know of how several processes share the work."""
    if ranks.world == 1:
        return []
    size = job.settings.per_device_train_batch_size
    each = math.ceil(size / ranks.world)
    notes = [
        f"{ranks.world} processes share each forward pass of {size} rows, up to {each} each, for the same steps that "
        "one process takes"
    ]
    if size < ranks.world:
        notes.append(f"{ranks.world - size} of them have no rows: raise --per-device-train-batch-size")
    if any(method.dropout for method in job.methods.values()):
        notes.append("dropout draws other masks than with another number of processes")
    return notes


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
            base = model.get_submodule(path).base
            norms[path] = float(f"{method.update_norm(base) / torch.linalg.vector_norm(base.row_norms()).item():.4g}")
    return norms


def _verdict(job: Job) -> list[str]:
    """What a user should know about how the run ended."""
    notes = []
    if job.stopped_early:
        notes.append(
            f"stopped early at step {job.step} of {job.total}: no better validation loss since step {job.best_step}"
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


def _result(config: RunConfig, job: Job, notes: list[str]) -> TrainResult:
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
        notes=tuple(notes),
    )
