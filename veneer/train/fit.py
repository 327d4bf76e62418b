"""How a run's layers are computed: compiled on a GPU, and as few of them twice as its free memory allows.

Kept activations grow by the same amount with every layer that is not recomputed, so two measured passes tell how many
fit: one that keeps one layer's, and one that keeps three.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from veneer.bases.kept import decoded_bytes
from veneer.config import TrainSettings
from veneer.kernels.triton_here import has_triton
from veneer.model.layers import arrange, decoder_layers
from veneer.model.packed import wiring_of
from veneer.model.probe import HALF
from veneer.train.feed import Feed
from veneer.train.job import Job
from veneer.train.memory import is_out_of_memory, memory_explained
from veneer.train.passes import Passes, computed
from veneer.train.ranks import Ranks

SPARE = 0.06  # of the memory is left over: blocks that no tensor fits, passes of other shapes
LITTLE = 0.02  # of the memory, that one layer's decoded weights may take
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
    on_gpu, layers = job.flat.values_P.is_cuda, len(decoder_layers(model))
    compiled, notes = _compiled(settings, on_gpu)
    wanted = settings.gradient_checkpointing
    if settings.optimizer_in_bwd:  # as each recomputed layer ends
        wanted = wanted if wanted == "offload" else True
        notes.append("all layers are computed twice, and each is updated as its backward ends (--optimizer-in-bwd)")
    if wanted == "auto" and (not on_gpu or settings.fsdp):
        wanted = on_gpu  # a base that is shared out for its size leaves little to measure
    # A sharded base is gathered, and offloaded inputs are copied, by calls that are not recorded; attention in float32,
    # and with caps or sinks, is computed by the lengths of each stream.
    recordable = compiled and not settings.fsdp and wanted != "offload" and model.dtype in HALF
    recordable = recordable and not wiring_of(model).by_lengths
    recordable = recordable and not settings.optimizer_in_bwd  # each of its steps has another learning rate

    def ended(layer: nn.Module) -> None:  # a function: a copied model takes no job with it
        job.layer_ended(layer)

    measure = wanted == "auto" and layers > MORE and not job.done
    if measure:
        arrange(model, compiled, layers - FEWER, decoded=_decodes_once(model))
    else:
        recompute = -1 if wanted and wanted != "auto" else 0
        arrange(model, compiled, recompute, offload=wanted == "offload" and on_gpu, ended=ended)
    if not on_gpu or settings.fsdp or job.done or not (measure or recordable):
        return Fitted(False, notes)
    with memory_explained(model, [job], ranks):
        measured = Measured(model, job, ranks, recordable)
        if measure:
            kept, note = _kept(measured, compiled, layers)
            arrange(model, compiled, layers - kept, decoded=_decodes_once(model))
            notes += [note] if note else []
        return Fitted(recordable and measured.fits_twice(), notes)


def _compiled(settings: TrainSettings, on_gpu: bool) -> tuple[bool, list[str]]:
    if settings.torch_compile is not None:
        return settings.torch_compile, []
    if not on_gpu or settings.fsdp:
        return False, []
    if not has_triton():
        return False, ["triton is not installed: layers are not compiled, which is slower"]
    return True, []


def _decodes_once(model: nn.Module) -> bool:
    """Whether one layer's decoded weights are little beside the memory that there is."""
    return max(map(decoded_bytes, decoder_layers(model))) <= LITTLE * available()


class Measured:
    """The largest pass of an epoch, to be computed for its memory; gradients are cleared again."""

    def __init__(self, model: nn.Module, job: Job, ranks: Ranks, graphs: bool) -> None:
        self.model, self.job = model, job
        step, micro = largest(job)
        # As the run will pack it: rounded up where it is to be recorded.
        self.ready = Feed(Passes(model, graphs), ranks).ready([job], micro, step - job.step)[1]
        self.most = available() * (1 - SPARE) - MOMENTS * len(job.flat)
        self.peak()  # compiles, and chooses kernels

    @property
    def tokens(self) -> int:
        return len(self.ready.stream.positions_T)

    def peak(self) -> float:
        """Bytes held at most, as the layers are arranged now."""
        torch.cuda.reset_peak_memory_stats()
        try:
            computed(self.model, self.ready)
        finally:
            self.job.flat.clear()
        return float(torch.cuda.max_memory_allocated())

    def fits_twice(self) -> bool:
        """Whether activations have room twice: a graph's memory is its own, and passes of other shapes need theirs."""
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        return held + 2 * (self.peak() - held) <= self.most


def _kept(measured: Measured, compiled: bool, layers: int) -> tuple[int, str | None]:
    """How many layers' activations fit beside everything else, and what to say of it."""
    fewer = measured.peak()  # as `fit` has arranged them
    arrange(measured.model, compiled, layers - MORE, decoded=_decodes_once(measured.model))
    try:
        more = measured.peak()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        more = float("inf")
    torch.cuda.empty_cache()
    kept, each = fitting(fewer, more, measured.most, layers), (more - fewer) / (MORE - FEWER)
    if kept == layers:
        return kept, None
    takes = f"of one take {each / 2**30:.2f} GiB" if math.isfinite(each) else f"of {MORE} do not fit"
    return kept, (
        f"{layers - kept} of {layers} layers are computed twice: at {measured.tokens:,} tokens the activations "
        f"{takes}, and {max(0.0, measured.most - fewer) / 2**30:.1f} GiB are free for them"
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
