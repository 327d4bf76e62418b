"""The two ends of a model, token embedding and vocabulary head, as leaves: where they are, and what slots add there.

Legend: T tokens, M rows of the stream that have a target, V vocabulary, B ids beyond it, W = V + B, D hidden size.

Both look a token up in one table (V, D), and in many models it is the same one (tied). An embedding is not multiplied,
so an update of it is looked up too: column t of A, then B. The head is not run by the packed forward, the losses ask it
for the logits of some rows; so it is told which they are, to know who speaks there.

Rows of added tokens may lie beyond the table (W ids, of which the first V have a row in it). The table does not grow:
where a slot with such rows speaks, the head has W logits, -inf where nobody who speaks has the token; where none does
it has the base's V, to the bit. An embedding of a token that its speaker does not have is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.errors import ModelError
from veneer.methods.base import Method
from veneer.methods.lora import LoRA
from veneer.methods.rows import TokenRows
from veneer.model.dropout import dropout_mask
from veneer.model.leaf import Leaf
from veneer.model.packed import Wiring
from veneer.model.stream import Span


class EmbeddingLeaf(Leaf):
    """A frozen token embedding with slots; in some families times a constant (Gemma's √D)."""

    def __init__(self, base: Base, wiring: Wiring, path: str, embedding: nn.Module) -> None:
        super().__init__(base, wiring, path)
        self.register_buffer("multiplier", multiplier_of(embedding), persistent=False)
        embedding.weight = None  # the base has it now
        self._embedding = (embedding,)  # what stood here, to stand here again; hidden from torch

    def put(self, weight: Tensor) -> None:
        _put(self, weight)

    def original(self) -> nn.Module:
        """The embedding that this leaf stands for, holding the same weight."""
        [embedding] = self._embedding
        embedding.weight = self.base.weight
        embedding.num_embeddings = len(embedding.weight)
        return embedding.to(self.base.device)

    def forward(self, ids: Tensor) -> Tensor:
        ids_T = ids.reshape(-1)
        y_TD, strange_T = self._looked_up(ids_T)
        parts = []
        for span in self.spans(len(ids_T)):
            here = slice(span.start, span.stop)
            method = self.slots[span.slot]
            delta = _embedded(method, ids_T[here], y_TD[here]) * span.weight
            parts.append(F.pad(delta, (0, 0, span.start, len(ids_T) - span.stop)))
            if strange_T is not None and isinstance(method, TokenRows):
                strange_T[here] &= method.places(ids_T[here]) < 0
        if parts:
            y_TD = y_TD + torch.stack(parts).sum(0)
        if strange_T is not None:
            y_TD = y_TD.masked_fill(strange_T[:, None], math.nan)
        if self.multiplier is not None:
            y_TD = y_TD * self.multiplier.to(y_TD.dtype)
        return y_TD.view(*ids.shape, self.out_features)

    def _looked_up(self, ids_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """The base's rows (T, D), and which tokens have none; None where no slot has tokens beyond the table."""
        if not any(_beyond(method, self.base.weight) for method in self.slots.values()):
            return F.embedding(ids_T, self.base.weight), None
        strange_T = ids_T >= len(self.base.weight)
        y_TD = F.embedding(ids_T.masked_fill(strange_T, 0), self.base.weight)
        return y_TD.masked_fill(strange_T[:, None], 0.0), strange_T


def _beyond(method: nn.Module, weight_VD: Tensor) -> int:
    """How many ids a method has beyond the table."""
    return method.vocabulary - len(weight_VD) if isinstance(method, TokenRows) else 0


def _put(leaf: Leaf, weight_OI: Tensor) -> None:
    """`Leaf.put` for a table that may have more rows than the leaf's."""
    base = leaf.base
    leaf.base = base.from_weight(weight_OI.detach().to(base.device, base.dtype, copy=True), base.bias)


def _embedded(method: Method, ids_T: Tensor, y_TD: Tensor) -> Tensor:
    """Δ (T, D) of tokens that the base has embedded as y_TD."""
    if isinstance(method, TokenRows):
        return method.embedded(ids_T, y_TD)
    assert isinstance(method, LoRA)
    a_RV, b_DR = method.pair()
    z_TR = F.embedding(ids_T, a_RV.t()).to(y_TD.dtype)
    return (z_TR @ b_DR.to(y_TD.dtype).t()) * method.scale


class HeadLeaf(Leaf):
    """A frozen vocabulary head with slots. Where it is tied to an embedding, that one's trained rows are its own."""

    _tied: tuple[EmbeddingLeaf, ...] = ()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """What torch calls for `head.weight = ...`, which is how transformers' `tie_weights` ties: it is the base's."""
        if name == "weight" and param is not None:
            self.base.weight = param.requires_grad_(False)
        else:
            super().register_parameter(name, param)

    def put(self, weight: Tensor) -> None:
        _put(self, weight)

    def tie(self, embedding: EmbeddingLeaf) -> None:
        self._tied = (embedding,)  # hidden from torch: it has a place of its own

    def methods(self, slot: str) -> list[Method]:
        """What the slot does here: a method of its own, and the rows of a tied embedding, unless it has its own."""
        own = [self.slots[slot]] if slot in self.slots else []
        if any(isinstance(method, TokenRows) for method in own):
            return own
        tied = [leaf.slots[slot] for leaf in self._tied if slot in leaf.slots]
        return own + [method for method in tied if isinstance(method, TokenRows)]

    def speakers(self) -> list[tuple[Span, Method]]:
        """Who speaks over which rows of the running stream; without a stream the voice, over all there are."""
        stream, voice = self.wiring.stream, self.wiring.voice
        spans: Sequence[Span] = stream.spans if stream is not None else [Span(0, -1, voice)] if voice else ()
        return [(span, method) for span in spans for method in self.methods(span.slot)]

    def forward(self, x: Tensor) -> Tensor:
        logits_MW = self.logits(x.reshape(-1, self.in_features))
        return logits_MW.view(*x.shape[:-1], logits_MW.shape[1])

    def logits(self, x_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        """(M, W) of hidden states that stand at rows_M of the running stream (None: all of it, or none runs)."""
        rows_M = self._all_rows(len(x_MD)) if rows_M is None else rows_M
        y_MV, speakers = self.base.linear(x_MD), self.speakers()
        bare_MV = y_MV if self.bias is None else y_MV - self.bias.to(y_MV.dtype)
        out_MW = self._widened(y_MV, speakers, rows_M)
        for span, method in speakers:
            here = self._inside(span, rows_M)
            x_here, bare = (x_MD, bare_MV) if here is None else (x_MD[here], bare_MV[here])
            if self._drops(span, method):
                x_here = x_here * self._mask_at(
                    x_MD, span, method, rows_M if here is None or rows_M is None else rows_M[here]
                )
            delta = method.delta(x_here, bare, self.base) * span.weight
            delta = F.pad(delta, (0, out_MW.shape[1] - delta.shape[1]))
            out_MW = out_MW + delta if here is None else out_MW.index_add(0, here, delta)
        return out_MW

    def _widened(self, y_MV: Tensor, speakers: Sequence[tuple[Span, Method]], rows_M: Tensor | None) -> Tensor:
        """The base's logits and those of tokens beyond the table (M, W): 0 where who speaks has the token, else -inf"""
        more = max((_beyond(method, self.base.weight) for _, method in speakers), default=0)
        if not more:
            return y_MV
        silent_MB = y_MV.new_ones(len(y_MV), more, dtype=torch.bool)
        for span, method in speakers:
            if own := _beyond(method, self.base.weight):
                assert isinstance(method, TokenRows)
                here = self._inside(span, rows_M)
                silent_MB[slice(None) if here is None else here, :own] &= method.place_V[-own:] < 0
        return torch.cat([y_MV, torch.zeros_like(y_MV[:, :1]).expand(-1, more).masked_fill(silent_MB, -math.inf)], 1)

    def _all_rows(self, rows: int) -> Tensor | None:
        stream = self.wiring.stream
        if stream is not None and rows != len(stream.token_ids_T):
            raise RuntimeError(f"{self.path}: got {rows} rows, the running stream has {len(stream.token_ids_T)}")
        return None if stream is None else torch.arange(rows, device=stream.token_ids_T.device)

    def _inside(self, span: Span, rows_M: Tensor | None) -> Tensor | None:
        """Which of the rows the span has; None: all, which no device is asked for."""
        stream = self.wiring.stream
        if rows_M is None or stream is None or (span.start, span.stop) == (0, len(stream.token_ids_T)):
            return None
        return ((rows_M >= span.start) & (rows_M < span.stop)).nonzero()[:, 0]

    def _mask_at(self, x_MD: Tensor, span: Span, method: Method, rows_M: Tensor | None) -> Tensor:
        """Inverted dropout mask of the method's input, drawn for all rows of the span, as any layer draws it."""
        stream = self.wiring.stream
        if rows_M is None or stream is None:
            return F.dropout(torch.ones_like(x_MD), method.dropout)
        return dropout_mask(stream.dropout_keys[span.slot], self.path, span.stop - span.start, x_MD, method.dropout)[
            rows_M - span.start
        ]


def embedding_path(model: Any) -> str | None:
    """The path of the token embedding."""
    return _path_of(model, "get_input_embeddings")


def head_path(model: Any) -> str | None:
    """The path of the vocabulary head."""
    return _path_of(model, "get_output_embeddings")


def _path_of(model: Any, getter: str) -> str | None:
    if not hasattr(model, getter):
        return None
    try:
        wanted = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    if wanted is None:
        return None
    return next((path for path, module in model.named_modules() if module is wanted), None)


def is_tied(model: Any) -> bool:
    """Whether embedding and head are one table."""
    paths = [path for path in (embedding_path(model), head_path(model)) if path is not None]
    weights: list[Any] = [getattr(model.get_submodule(path), "weight", None) for path in paths]
    if len(weights) < 2 or any(weight is None for weight in weights) or weights[0].shape != weights[1].shape:
        return False
    return _memory(weights[0]) == _memory(weights[1])


def _memory(weight: Tensor) -> tuple[Any, int]:
    return (weight.device, weight.data_ptr()) if weight.device.type != "meta" else (weight.device, id(weight))


def multiplier_of(embedding: nn.Module) -> Tensor | None:
    """The constant that an embedding's rows are multiplied with, None where there is none.

    Raises ModelError for a module that does anything else than to look up rows: an update of it would be wrong.
    """
    weight: Any = getattr(embedding, "weight", None)
    is_plain = isinstance(embedding, nn.Embedding) and embedding.max_norm is None and weight.is_floating_point()
    scale = getattr(embedding, "embed_scale", None)
    if is_plain and (scale is None or isinstance(scale, (int, float, Tensor))):
        scale = None if scale is None else torch.as_tensor(scale, device=weight.device).detach().clone()
        ids = torch.arange(min(4, len(weight)), device=weight.device)
        rows = weight.detach()[ids]
        with torch.no_grad():
            got = embedding(ids)
        if got.shape == rows.shape and torch.equal(got, rows if scale is None else rows * scale.to(rows.dtype)):
            return scale
    raise ModelError(
        f"the token embedding is a {type(embedding).__name__}, which does more than to look up rows (or holds them "
        "quantised); next: leave it out of --target-modules and --trainable-token-indices, or load the base dense"
    )
