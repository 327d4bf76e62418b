"""The leaf that stands where a linear layer stood: one base, any number of slots.

Legend: T tokens, I in, O out.

A layer's output is y + Σ over slots of weight · Δ + bias. The leaf keeps the layer's name and, in `state_dict`, its
original keys: `q_proj.weight`, never `q_proj.base.weight`, so that `save_pretrained` writes the base model as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.methods.base import Method
from veneer.methods.lora import LoRA
from veneer.model.dropout import dropout_mask
from veneer.model.packed import Wiring
from veneer.model.siblings import compute
from veneer.model.stream import Span
from veneer.model.traced import numbered, traced


class Slotted(nn.Module):
    """A place for adapters in a model: `slots`, name -> method, all at the same frozen weight."""

    slots: nn.ModuleDict

    wiring: Wiring
    path: str

    def put(self, weight: Tensor) -> None:
        """From now this is the base's weight, in the base's own storage and dtype."""
        raise NotImplementedError

    def spans(self, tokens: int) -> Sequence[Span]:
        """Who speaks here over the rows that come in now, so many."""
        stream, voice = self.wiring.stream, self.wiring.voice
        if stream is None:
            return [Span(0, tokens, voice)] if voice is not None and voice in self.slots else ()
        try:
            return [span for span in self.wiring.spans(tokens) if span.slot in self.slots]
        except ValueError as error:
            raise RuntimeError(f"{self.path}: {error}") from error


class Leaf(Slotted):
    """A frozen linear layer with slots."""

    def __init__(self, base: Base, wiring: Wiring, path: str) -> None:
        super().__init__()
        self.base, self.slots = base, nn.ModuleDict()
        self.wiring, self.path = wiring, path
        self.siblings = [self]  # one list for all leaves of a family, see veneer.model.siblings
        self.number = numbered(self)
        self.register_load_state_dict_pre_hook(_restore_names)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = numbered(self)  # a copy has its own: by the original's, compiled layers would find its weights

    @property
    def weight(self) -> Tensor:
        """The stored weight, for code that asks a linear layer for it (dtype, device, shape)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def put(self, weight: Tensor) -> None:
        self.base = self.base.packed(weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, slots={list(self.slots)}"

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.wiring.whole is not None:
            return traced(self, x)
        tokens = x.numel() // self.in_features
        spans = self.spans(tokens)
        if not spans:
            return self.base.linear(x)
        if not self.pieces(tokens):
            y_TO = self._by_delta(x, spans)
        elif self.wiring.stream is not None:
            y_TO = self.wiring.waiting.output(self, x)
        else:
            y_TO = compute(self, x, [self])[self.path]
        return y_TO.view(*x.shape[:-1], self.out_features)

    def pieces(self, tokens: int) -> list[tuple[Span, LoRA]]:
        """What the fused operation computes here beside the base; empty where it does not apply."""
        pieces = []
        for span in self.spans(tokens):
            method = self.slots[span.slot]
            if not isinstance(method, LoRA) or self._drops(span, method):
                return []
            pieces.append((span, method))
        return pieces

    def _by_delta(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        """The general way, for any method and for dropout: one delta a span."""
        x_TI = x.reshape(-1, self.in_features)
        bias, y_TO = self.base.bias, self.base.linear(x_TI)
        parts = []
        for span in spans:
            method, rows = self.slots[span.slot], slice(span.start, span.stop)
            x_here, y_here = x_TI[rows], y_TO[rows]
            if self._drops(span, method):
                x_here = x_here * self._mask(x_TI, span, method)
            delta = method.delta(x_here, y_here if bias is None else y_here - bias.to(y_here.dtype), self.base)
            parts.append(F.pad(delta * span.weight, (0, 0, span.start, x_TI.shape[0] - span.stop)))
        return y_TO + torch.stack(parts).sum(0)

    def _drops(self, span: Span, method: Method) -> bool:
        """Whether the method's input is dropped from now: in a stream with a key for it, else in training mode."""
        stream = self.wiring.stream
        return method.dropout > 0 and (self.training if stream is None else span.slot in stream.dropout_keys)

    def _mask(self, x_TI: Tensor, span: Span, method: Method) -> Tensor:
        """Inverted dropout mask for the method's input."""
        rows = span.stop - span.start
        if self.wiring.stream is None:
            # An ordinary call, as transformers.Trainer makes it: torch's own generator.
            return F.dropout(torch.ones_like(x_TI[:rows]), method.dropout)
        return dropout_mask(self.wiring.stream.dropout_keys[span.slot], self.path, rows, x_TI, method.dropout)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base alone, under the names that the linear layer had; adapters are taken with `veneer.take`."""
        return self.base.state_dict(*args, **kwargs)


def _restore_names(leaf: Leaf, state: dict[str, Tensor], prefix: str, *_unused: Any) -> None:
    """Before loading: original names -> the base's; slots keep what they hold (not part of the model's state)."""
    for name, value in leaf.named_parameters():
        inside = name.removeprefix("base.")
        if name.startswith("base.") and prefix + inside in state:
            state[f"{prefix}{name}"] = state.pop(prefix + inside)
        elif name.startswith("slots."):
            state.setdefault(f"{prefix}{name}", value)
