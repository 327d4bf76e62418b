"""Forward and backward of a micro-batch; on a GPU as one CUDA graph, where its shape comes back.

Legend: T tokens, M targets, N sequences, S segments.

Launching a layer's hundred kernels from Python takes about as long as computing it at 4,096 tokens. A graph is
launched as one. It computes on the same memory each time, so every pass of a shape is copied into the tensors of the
first: streams are rounded up to few shapes, and what fills them up weighs nothing. What a graph cannot hold (several
slots, dropout, sequences that share their beginnings, a sharded base) is launched kernel by kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.model.losses import Loss, Targets, cross_entropy, targets_of
from veneer.model.packed import check_positions, running, whole, wiring_of
from veneer.model.stream import EVEN, Span, Stream, pack
from veneer.model.varlen import Varlen, varlen_of
from veneer.notes import tell

GRAPHS = 8  # shapes that are kept; each holds some megabytes beside the memory that all share
REMEMBERED = 64  # shapes without one; a few tensors of ids each
SEEN = 2  # passes of a shape before it is recorded: kernels are compiled and chosen in the first
SAVES = 0.1  # sharing beginnings goes before a graph where it spares at least this share of the tokens


class Pass(NamedTuple):
    """One micro-batch, ready to be computed: the loss is Σ over sequences of weight · what `loss` gives each."""

    stream: Stream
    targets: Targets
    weights_N: Tensor
    loss: Loss = cross_entropy


class Shape(NamedTuple):
    """What two passes have in common that one graph can compute."""

    slot: str
    tokens: int
    targets: int
    sequences: int
    segments: int
    longest: int
    equal: int
    loss: Loss


class Passes:
    """Computes passes, and remembers the shapes it has seen."""

    def __init__(self, model: nn.Module, graphs: bool = False) -> None:
        # Attention that is computed by a stream's lengths cannot be computed on buffers that other streams come into.
        self.model, self.graphs = model, graphs and not wiring_of(model).by_lengths
        self.held: dict[Shape, Recorded] = {}
        self.pool: tuple[int, int] | None = None  # the memory of all graphs: one runs at a time

    def ready(
        self,
        sequences: Sequence[Sequence[int]],
        trained: Sequence[Sequence[bool]],
        weights: Sequence[float],
        slots: Sequence[str],
        dropout_keys: dict[str, int],
        loss: Loss = cross_entropy,
    ) -> Pass:
        """Packs a micro-batch, on the CPU: to copy it would wait for what the GPU computes now. It is rounded up to a
        shape that may come back where graphs are recorded."""
        tokens = sum(map(len, sequences))
        stream = pack(sequences, slots, "cpu", dropout_keys, share=True, multiple=EVEN)
        if self.graphs and len(stream.token_ids_T) > (1 - SAVES) * tokens:
            stream = pack(sequences, slots, "cpu", dropout_keys, multiple=grain(tokens))
        check_positions(self.model, stream)  # here: buffers cannot tell it
        made = Pass(stream, targets_of(stream, trained), torch.tensor(weights), loss)
        if _device(self.model).type == "cpu":
            return made
        made = each(made, Tensor.pin_memory)
        if self.graphs and not stream.branches:  # what `fill` will copy of the plan
            plan = varlen_of(made.stream)
            made.stream.plans["varlen"] = plan._replace(starts=plan.starts.pin_memory())
        return made

    def __call__(self, ready: Pass) -> Tensor:
        """Adds the gradients to the adapters'; returns each sequence's weighted loss (N)."""
        shape = shape_of(ready) if self.graphs else None
        if shape is None:
            return computed(self.model, ready)
        if shape not in self.held:
            self._make_room()
            self.held[shape] = Recorded(self.model, buffers(shape, _device(self.model)))
        held = self.held[shape]
        if held.graph is None and held.passes >= SEEN and self._recorded() < GRAPHS:
            self._record(held)
        return held(ready)

    def _recorded(self) -> int:
        return sum(held.graph is not None for held in self.held.values())

    def _make_room(self) -> None:
        """Forgets the oldest shape without a graph, where many are remembered."""
        waiting = [shape for shape, held in self.held.items() if held.graph is None]
        if len(waiting) >= REMEMBERED:
            del self.held[waiting[0]]

    def _record(self, held: Recorded) -> None:
        stream = torch.cuda.current_stream()
        try:
            self.pool = held.record(self.pool)
        except RuntimeError as error:  # it does not fit, or cannot be recorded; nothing has been computed yet
            torch.cuda.set_stream(stream)  # a recording that fails at its end leaves its own in place
            self.graphs = False
            cause = str(error.__context__ or error).strip() or type(error).__name__
            tell(f"passes are launched kernel by kernel, perhaps slower: {cause.splitlines()[0]}")


def computed(model: nn.Module, ready: Pass) -> Tensor:
    """A pass launched kernel by kernel, where the model is."""
    device = _device(model)
    if ready.stream.token_ids_T.device != device:
        ready = each(ready, lambda tensor: tensor.to(device, non_blocking=True))
    with running(model, ready.stream):
        sums_N, _ = ready.loss(model, ready.stream, ready.targets)
        losses_N = sums_N * ready.weights_N
        losses_N.sum().backward()
    return losses_N.detach()


def each(ready: Pass, change: Callable[[Tensor], Tensor]) -> Pass:
    """The pass with all its tensors changed; what was planned of its stream is planned anew."""
    ids_T, positions_T = change(ready.stream.token_ids_T), change(ready.stream.positions_T)
    stream = dataclasses.replace(ready.stream, token_ids_T=ids_T, positions_T=positions_T)
    return Pass(stream, Targets(*map(change, ready.targets)), change(ready.weights_N), ready.loss)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def grain(tokens: int) -> int:
    """What a stream's length is rounded up to a multiple of: at most a sixteenth of it."""
    return max(EVEN, 1 << max(0, tokens.bit_length() - 5))


def shape_of(ready: Pass) -> Shape | None:
    """The shape that holds this pass, rounded up; None where a graph cannot."""
    stream = ready.stream
    slot, tokens = whole(stream), len(stream.token_ids_T)
    if slot is None or stream.branches:
        return None
    plan, sequences, targets = varlen_of(stream), len(stream.sequences), _up(len(ready.targets.rows_M))
    if plan.equal:
        # Every segment has a place of its own in the kernel's grid: as many as there are.
        segments = len(stream.lengths)  # what fills the stream up may be one of them
        return Shape(slot, tokens, targets, sequences, segments, plan.longest, plan.equal, ready.loss)
    segments, longest = _power(len(stream.lengths)), min(tokens, _power(plan.longest))
    return Shape(slot, tokens, targets, _power(sequences), segments, longest, 0, ready.loss)


def _up(targets: int) -> int:
    step = grain(targets)
    return -(-targets // step) * step


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


class Recorded:
    """The tensors of a shape, and its graph once it has come back often enough.

    Before, passes are computed on the same tensors: what a compiled layer asks of its input (how many segments, how
    long) has been asked then, and nothing is compiled while a graph is being recorded.
    """

    def __init__(self, model: nn.Module, here: Pass) -> None:
        self.model, self.here, self.passes = model, here, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.losses_N = torch.empty(0)  # what the graph writes

    def record(self, pool: tuple[int, int] | None) -> tuple[int, int]:
        """Records the graph, which computes nothing yet; returns the memory that it uses."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.losses_N = computed(self.model, self.here)
        self.graph = graph
        return graph.pool()

    def __call__(self, ready: Pass) -> Tensor:
        fill(self.here, ready)
        self.passes += 1
        if self.graph is None:
            return computed(self.model, self.here)[: len(ready.weights_N)]
        self.graph.replay()
        return self.losses_N[: len(ready.weights_N)].clone()


def buffers(shape: Shape, device: torch.device) -> Pass:
    """A pass of this shape to copy others into."""
    ids = torch.zeros(shape.tokens, dtype=torch.int64, device=device)
    lengths = (shape.equal,) * shape.segments if shape.equal else (shape.tokens, *(0,) * (shape.segments - 1))
    span = Span(0, shape.tokens, shape.slot)
    stream = Stream(
        ids, torch.zeros_like(ids), lengths, (span,), last=tuple(range(shape.sequences + 1)), rounded=not shape.equal
    )
    starts, key_starts = (torch.zeros(shape.segments + 1, dtype=torch.int32, device=device) for _ in range(2))
    stream.plans["varlen"] = Varlen(starts, key_starts, shape.longest, shape.longest, shape.equal, None)
    targets = Targets(*torch.zeros(3, shape.targets, dtype=torch.int64, device=device))
    return Pass(stream, targets, torch.zeros(shape.sequences + 1, device=device), shape.loss)


def fill(here: Pass, ready: Pass) -> None:
    """Copies a pass into buffers of its shape; targets beyond its own belong to a sequence that weighs nothing."""
    here.stream.token_ids_T.copy_(ready.stream.token_ids_T, non_blocking=True)
    here.stream.positions_T.copy_(ready.stream.positions_T, non_blocking=True)
    tokens, starts = len(ready.stream.token_ids_T), varlen_of(ready.stream).starts
    for held in varlen_of(here.stream)[:2]:  # of queries and keys, which are the same where nothing is shared
        held[: len(starts)].copy_(starts, non_blocking=True)
        held[len(starts) :].fill_(tokens)
    count, nobody = len(ready.targets.rows_M), len(here.weights_N) - 1
    for buffer, value, rest in zip(here.targets, ready.targets, (0, 0, nobody), strict=True):
        buffer[:count].copy_(value, non_blocking=True)
        buffer[count:].fill_(rest)
    here.weights_N[: len(ready.weights_N)].copy_(ready.weights_N, non_blocking=True)
    here.weights_N[len(ready.weights_N) :].zero_()
