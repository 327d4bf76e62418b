"""The packed forward: many sequences in one row of tokens, no padding, no cross-talk.

Legend: T tokens of the stream, D hidden size.

The model's own code runs unmodified. While a stream is `running`, its attention is ours (`veneer.model.attention`),
and the swapped leaves read from the stream which rows belong to which slot. Outside, an ordinary `model(...)` call
keeps the model's own attention and speaks with the wiring's `voice`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.errors import ModelError
from veneer.model.attention import ATTENTION
from veneer.model.siblings import Waiting
from veneer.model.stream import Span, Stream
from veneer.model.text import body_of, learned_positions
from veneer.model.unread import Unread
from veneer.model.varlen import varlen_of

if TYPE_CHECKING:
    from veneer.model.added_tokens import Extended
    from veneer.model.leaf import Leaf


class Wiring:
    """The one plain object that all swapped leaves read. No context variable: autograd has threads of its own."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.slots: list[str] = []  # in the order of attaching
        self.extended: dict[str | None, Extended] = {}  # by slot, of those that have added tokens
        self.waiting = Waiting()
        self.whole: str | None = None  # the one slot that speaks over all rows of the stream; None: none, or several
        self.thin: tuple | None = None  # x and its thin products, while siblings are traced: see veneer.model.traced
        self.latest: Leaf | None = None  # whose product was the last one; None: a family's, computed together
        self.unread: Leaf | None = None  # whose product nobody will read: see veneer.model.unread
        self.unread_value = math.nan
        self.window: slice | None = None  # of the stream's rows: those that leaves are fed now; None: all
        self.voice: str | None = None  # the slot of ordinary calls; None is the base alone
        self.positions: int | None = None  # how many the model has an embedding of; None: any number
        self.by_lengths = False  # some layer's attention needs the stream's lengths on the host
        self.probed = False
        self.fault: str | None = None  # why this model cannot take the packed path

    def operands(self, leaves: Sequence[Leaf]) -> list[Base | Unread]:
        """What to multiply of leaves that are computed together, now; remembers the last of them."""
        self.latest = leaves[0] if len(leaves) == 1 else None
        return [Unread(leaf.base, self.unread_value) if leaf is self.unread else leaf.base for leaf in leaves]

    @contextmanager
    def seeing(self, rows: slice) -> Iterator[None]:
        """While inside, leaves are fed these rows of the stream."""
        self.window = rows
        try:
            yield
        finally:
            self.window = None

    def spans(self, tokens: int) -> Sequence[Span]:
        """Who speaks over the rows that leaves are fed now. Raises ValueError where it is another number of rows."""
        stream = self.stream
        assert stream is not None
        start, stop = (self.window.start, self.window.stop) if self.window else (0, len(stream.token_ids_T))
        if tokens != stop - start:
            raise ValueError(f"got {tokens} rows, the running stream has {stop - start}")
        if self.window is None:
            return stream.spans
        inside = [span for span in stream.spans if span.start < stop and span.stop > start]
        return [Span(max(s.start, start) - start, min(s.stop, stop) - start, s.slot, s.weight) for s in inside]

    @contextmanager
    def leaving_out(self, leaf: Leaf | None, value: float = math.nan) -> Iterator[None]:
        """While inside, the product of this leaf's base is not computed: it has this value everywhere."""
        self.unread, self.unread_value = leaf, value
        try:
            yield
        finally:
            self.unread = None


def wiring_of(model: nn.Module) -> Wiring:
    """The model's wiring, made at the first question."""
    if not hasattr(model, "veneer_wiring"):
        model.veneer_wiring = Wiring()
        if hasattr(model, "base_model"):
            model.veneer_wiring.positions = learned_positions(model)
        for module in _attentive(model):  # decoder layers of some families do not hand on a stream given as an argument
            module.veneer_wiring = model.veneer_wiring
            _heed_cap(module.config)
    return model.veneer_wiring


def _heed_cap(config: Any) -> None:
    """Has transformers compute the caps of Gemma 2's attention: its default, sdpa, leaves them out in 5.17."""
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        config._attn_implementation = "eager"


def _attentive(model: nn.Module) -> list[nn.Module]:
    """The modules that read from a config how to compute attention."""
    return [m for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]


def check_positions(model: nn.Module, stream: Stream) -> None:
    """Raises ModelError for a sequence longer than the positions that the model has embeddings of."""
    most = wiring_of(model).positions
    if most is not None and not stream.rounded and max(stream.seen) > most:
        raise ModelError(
            f"a sequence of {max(stream.seen)} tokens, and this model has positions for {most}; "
            f"next: --max-length {most}"
        )


@contextmanager
def running(model: nn.Module, stream: Stream) -> Iterator[None]:
    """While inside, `hidden_states` may be called and its graph run backward; leave it after backward has ended."""
    wiring = wiring_of(model)
    if wiring.fault:
        raise ModelError(f"this model has no packed path: {wiring.fault}")
    unknown = sorted({span.slot for span in stream.spans} - set(wiring.slots))
    if unknown:
        raise ModelError(f"no slot named {', '.join(unknown)}; attached are: {', '.join(wiring.slots) or 'none'}")
    if wiring.stream is not None:
        raise RuntimeError("a stream is already running on this model; run one after the other")
    check_positions(model, stream)
    wiring.stream, wiring.whole = stream, whole(stream)
    if stream.token_ids_T.is_cuda:
        varlen_of(stream)
    try:
        with attending_by(model, ATTENTION):
            yield
    finally:
        wiring.stream = wiring.whole = wiring.thin = None
        wiring.waiting.clear()


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """Inside `running`, without gradients: the same stream, and nobody speaks, so that it is the base's."""
    wiring = wiring_of(model)
    stream, spoken = wiring.stream, wiring.whole
    if stream is None:
        raise RuntimeError("no stream is running on this model")
    silent = dataclasses.replace(stream, spans=())
    silent.plans.update(stream.plans)
    wiring.stream, wiring.whole = silent, None
    try:
        yield
    finally:
        wiring.stream, wiring.whole = stream, spoken
        wiring.thin = None
        wiring.waiting.clear()


@contextmanager
def attending_by(model: nn.Module, attention: str) -> Iterator[None]:
    """While inside, the model computes attention by the implementation that transformers knows under this name."""
    configs = {id(module.config): module.config for module in _attentive(model)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = attention
        yield
    finally:
        for config, attention_before in before:
            config._attn_implementation = attention_before


def whole(stream: Stream) -> str | None:
    """The slot that speaks over all rows, alone and without dropout; None where it is not as simple as that."""
    if len(stream.spans) != 1 or stream.spans[0].slot in stream.dropout_keys:
        return None
    span = stream.spans[0]
    return span.slot if (span.start, span.stop, span.weight) == (0, len(stream.token_ids_T), 1.0) else None


def hidden_states(model: nn.Module) -> Tensor:
    """Final hidden states (T, D) of the running stream, before the head."""
    stream = wiring_of(model).stream
    if stream is None:
        raise RuntimeError("hidden_states: no stream is running; call it inside `with running(model, stream):`")
    out = body_of(model)(
        input_ids=stream.token_ids_T[None],
        position_ids=stream.positions_T[None],
        use_cache=False,
        veneer_stream=stream,
    )
    return out.last_hidden_state[0]


@contextmanager
def speaking(model: nn.Module, slot: str | None) -> Iterator[None]:
    """While inside, ordinary calls (`generate`, `model(...)`) speak with `slot`; None is the base alone."""
    wiring = wiring_of(model)
    if slot is not None and slot not in wiring.slots:
        raise ModelError(f"no slot named {slot!r}; attached are: {', '.join(wiring.slots) or 'none'}")
    before, wiring.voice = wiring.voice, slot
    try:
        yield
    finally:
        wiring.voice = before
