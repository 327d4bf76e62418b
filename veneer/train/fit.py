"""How a run's layers are computed: compiled on a GPU, and as few of them twice as its free memory allows.

Kept activations grow by the same amount with every layer that is not recomputed, so two measured passes tell how many
fit: one that keeps one layer's, and one that keeps three.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import nn

from veneer.config import TrainSettings
from veneer.model.layers import arrange, decoder_layers
from veneer.train.feed import Feed
from veneer.train.job import Job
from veneer.train.memory import memory_explained
from veneer.train.passes import Passes, computed
from veneer.train.ranks import Ranks

SPARE = 0.06  # of the memory is left over: blocks that no tensor fits, passes of other shapes
MOMENTS = 8  # bytes a parameter that the optimiser asks for at its first step
FEWER, MORE = 1, 3  # layers whose activations the two passes keep


class Fitted(NamedTuple):
    """How the layers run, and what a user should know of it."""

    graphs: bool  # whether passes may be recorded
    notes: list[str]


def fit(model: nn.Module, job: Job, settings: TrainSettings, ranks: Ranks) -> Fitted:
    """Arranges the model's layers as the settings ask, and where they leave it open, as the machine allows.

    Raises NotEnoughMemoryError where the largest pass of an epoch does not fit even with all layers computed twice.
    """
    on_gpu = job.flat.values_P.is_cuda
    compiled, notes = _compiled(settings, on_gpu)
    wanted = settings.gradient_checkpointing
    if wanted == "auto" and (not on_gpu or settings.fsdp):
        wanted = on_gpu  # a base that is shared out for its size leaves little to measure
    if wanted != "auto":
        arrange(model, compiled, -1 if wanted else 0, offload=wanted == "offload" and on_gpu)
    else:
        layers = len(decoder_layers(model))
        with memory_explained(model, [job], ranks):
            kept, note = _kept(model, job, ranks, compiled, layers) if layers > MORE else (layers, None)
        arrange(model, compiled, layers - kept)
        notes += [note] if note else []
    # A sharded base is gathered, and offloaded inputs are copied, by calls that are not recorded.
    return Fitted(compiled and on_gpu and not settings.fsdp and wanted != "offload", notes)


def _compiled(settings: TrainSettings, on_gpu: bool) -> tuple[bool, list[str]]:
    if settings.torch_compile is not None:
        return settings.torch_compile, []
    if not on_gpu or settings.fsdp:
        return False, []
    if importlib.util.find_spec("triton") is None:
        return False, ["triton is not installed: layers are not compiled, which is slower"]
    return True, []


def _kept(model: nn.Module, job: Job, ranks: Ranks, compiled: bool, layers: int) -> tuple[int, str | None]:
    """How many layers' activations fit beside everything else, in the largest pass of an epoch."""
    step, micro = largest(job)
    ready = Feed(Passes(model), ranks).ready([job], micro, step - job.step)[1]
    peaks = []
    for count in (FEWER, FEWER, MORE):  # the first compiles, and chooses kernels
        arrange(model, compiled, layers - count)
        torch.cuda.reset_peak_memory_stats()
        try:
            computed(model, ready)
        except torch.OutOfMemoryError:
            if count == FEWER:
                raise
            peaks.append(float("inf"))
            continue
        finally:
            job.flat.grads_P.zero_()
        peaks.append(float(torch.cuda.max_memory_allocated()))
    torch.cuda.empty_cache()
    most = available() * (1 - SPARE) - MOMENTS * len(job.flat)
    return fitting(peaks[1], peaks[2], most, layers), _told(
        peaks[1], peaks[2], most, layers, len(ready.stream.positions_T)
    )


def fitting(fewer: float, more: float, most: float, layers: int) -> int:
    """Layers that can keep their activations under `most` bytes, when FEWER and MORE of them lead to these peaks."""
    each = (more - fewer) / (MORE - FEWER)
    return layers if each <= 0 else min(layers, max(FEWER, FEWER + int((most - fewer) // each)))


def available() -> int:
    """Bytes of GPU memory that this process may hold: what it has, and what is free under its limit."""
    free, total = torch.cuda.mem_get_info()
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()  # younger than torch 2.8
    return min(free + torch.cuda.memory_reserved(), int(total * fraction))


def largest(job: Job) -> tuple[int, int]:
    """Step and micro-batch of the most tokens, in an epoch from now."""
    size, lengths = job.settings.per_device_train_batch_size, [len(example.input_ids) for example in job.train]
    most, where = -1, (job.step, 0)
    for step in range(job.step, min(job.total, job.step + job.batches.steps_per_epoch)):
        rows = job.batches.rows(step)
        for micro in range(0, len(rows), size):
            tokens = sum(lengths[row] for row in rows[micro : micro + size])
            if tokens > most:
                most, where = tokens, (step, micro // size)
    return where


def _told(fewer: float, more: float, most: float, layers: int, tokens: int) -> str | None:
    kept, each = fitting(fewer, more, most, layers), (more - fewer) / (MORE - FEWER)
    if kept == layers:
        return None
    return (
        f"{layers - kept} of {layers} layers are computed twice: at {tokens:,} tokens the activations of one take "
        f"{each / 2**30:.2f} GiB, and {max(0.0, most - fewer) / 2**30:.1f} GiB are free for them"
    )
