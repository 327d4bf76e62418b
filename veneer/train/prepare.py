"""What stands before the first step: checks, data, base, adapter and job. Nothing is written."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.adapter.attach import attach, methods_of
from veneer.config import RunConfig
from veneer.errors import ConfigError
from veneer.model.added_tokens import extended
from veneer.model.load import Loaded, load, load_tokenizer
from veneer.model.quantised import Way, check_way
from veneer.train.allocator import growing_segments, keep_freed_memory
from veneer.train.cautions import Facts, cautions
from veneer.train.earlier import orthogonality, read_earlier
from veneer.train.job import Job, total_steps
from veneer.train.optim import check_optimizer
from veneer.train.orthogonal import Orthogonality
from veneer.train.ranks import Ranks
from veneer.train.rows import TrainingData, read_data
from veneer.train.schedule import Rate, choose_rate
from veneer.train.shard import check_shardable, shard
from veneer.train.trackers import check_trackers

SLOT = "default"


class Prepared(NamedTuple):
    """A run, ready for its first step."""

    loaded: Loaded
    data: TrainingData
    job: Job
    rate: Rate
    notes: list[str]
    warnings: list[str]


def prepare(config: RunConfig, ranks: Ranks, loaded: Loaded | None = None, progress: bool = False) -> Prepared:
    """Reads data, and the base unless `loaded` is it, and attaches the adapter.

    Raises ConfigError, DataError, ModelError, AdapterError.
    """
    keep_freed_memory()
    growing_segments()
    _check_machine(config)
    check_shardable(config.train.fsdp, ranks)
    if config.train.optimizer_in_bwd and ranks.world > 1:
        raise ConfigError("--optimizer-in-bwd updates before gradients could be summed over processes; leave it out")
    tokenizer = loaded.tokenizer if loaded else load_tokenizer(config.base_model)
    known = extended(tokenizer, config.lora.add_tokens).tokenizer if config.lora.add_tokens else tokenizer
    data = read_data(config, known)  # before the weights: a fault in the data shows at once
    earlier = read_earlier(config.orthogonal, tokenizer)
    dtype, device = _place(config)
    loaded = loaded or load(
        config.base_model, dtype, device, tokenizer=tokenizer, storage=config.storage, progress=progress
    )
    attach(loaded.model, config.lora, SLOT, seed=config.train.seed)
    apart = orthogonality(earlier, loaded.model, methods_of(loaded.model, SLOT), config.orthogonal, progress)
    if config.train.fsdp:
        shard(loaded.model, ranks)
    _check_recompute(loaded.model, config.train.gradient_checkpointing)
    steps = total_steps(config.train, len(data.train))
    rate = choose_rate(config.train, config.lora, loaded.model.config, steps)
    methods, scaled = methods_of(loaded.model, SLOT), loaded.model.dtype == torch.float16
    job = Job(SLOT, config.train, data.train, data.validation, rate.value, methods, scaled, apart)
    notes = [*data.notes, f"learning rate {rate.value:g}: {rate.reason}"]
    notes += [*_slow_storage(loaded.model, loaded), *_sharing(job, ranks), *_apart(apart)]
    return Prepared(loaded, data, job, rate, notes, _warnings(config, job, loaded.model))


def _warnings(config: RunConfig, job: Job, model: PreTrainedModel) -> list[str]:
    usual = choose_rate(config.train.model_copy(update={"learning_rate": None}), config.lora, model.config, job.total)
    tokens = sum(sum(example.targets) for example in job.train)
    facts = Facts(list(job.methods), len(job.flat), len(job.train), tokens, usual.value)
    return list(map(str, cautions(config, facts)))


def _check_machine(config: RunConfig) -> None:
    """Raises ConfigError or ModelError where this machine lacks what the options ask for."""
    check_optimizer(config.train.optim)
    check_trackers(config.reporting.report_to)
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


def _place(config: RunConfig) -> tuple[str, str]:
    """In what dtype and where to load. A base to share out is too large for one GPU: it comes by way of the CPU."""
    if not (config.train.fsdp and torch.cuda.is_available()):
        return config.dtype, "auto"
    return "bfloat16" if config.dtype == "auto" else config.dtype, "cpu"


def _check_recompute(model: PreTrainedModel, wanted: bool | str) -> None:
    dropouts = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if wanted in (True, "offload") and dropouts:
        raise ConfigError(f"--gradient-checkpointing: this base has dropout of its own ({', '.join(dropouts[:3])})")


def _slow_storage(model: PreTrainedModel, loaded: Loaded) -> list[str]:
    if model.device.type != "cpu" or loaded.storage.startswith("dense"):
        return []
    return [
        f"the base is stored as {loaded.storage} and decoded for every product: on a CPU that saves memory and takes "
        "several times as long"
    ]


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


def _apart(apart: Orthogonality | None) -> list[str]:
    """What a user should know of the adapters that the new one is kept apart from."""
    if apart is None:
        return []
    told, overlap = apart.facts(), apart.facts()["overlap"]
    count = len(told["adapters"])
    weight = f"lambda {apart.weight:g}" if apart.weight else "no term in the loss"
    notes = [
        f"orthogonal to {count} adapter{'s' * (count > 1)} in {told['layers']} of {told['layers_trained']} layers, "
        f"{weight}: {overlap['at_start']:.2%} of A lies in what they read, "
        f"{overlap['of_random_factors']:.2%} would by chance"
    ]
    if "answered" in told:
        seen = f"on rows of their data that the start did not see, A answers {told['answered']['share']:.2%} of what "
        where = f"{told['answered']['layers']} of {told['layers_trained']} layers"
        notes.append(f"{seen}random factors would, in {where}")
    return notes


def current(device: torch.device) -> AbstractContextManager:
    """Inside, what asks for the current GPU (its memory, its streams) means this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
