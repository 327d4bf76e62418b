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
from veneer.kernels.lora import Piece, lora_linear
from veneer.methods.base import Method
from veneer.methods.lora import LoRA
from veneer.model.dropout import dropout_mask
from veneer.model.packed import Wiring
from veneer.model.stream import Span


class Leaf(nn.Module):
    """A frozen linear layer with slots."""

    def __init__(self, base: Base, wiring: Wiring, path: str) -> None:
        super().__init__()
        self.base, self.slots = base, nn.ModuleDict()
        self.wiring, self.path = wiring, path
        self.register_load_state_dict_pre_hook(_restore_names)

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

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, slots={list(self.slots)}"

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, self.in_features)
        spans = self._spans(x_TI.shape[0])
        if not spans:
            return self.base.linear(x)
        return self._adapted(x_TI, spans).view(*x.shape[:-1], self.out_features)

    def _spans(self, tokens: int) -> Sequence[Span]:
        stream, voice = self.wiring.stream, self.wiring.voice
        if stream is None:
            return [Span(0, tokens, voice)] if voice is not None and voice in self.slots else ()
        if tokens != len(stream.token_ids_T):
            raise RuntimeError(f"{self.path}: got {tokens} rows, the running stream has {len(stream.token_ids_T)}")
        return [span for span in stream.spans if span.slot in self.slots]

    def _adapted(self, x_TI: Tensor, spans: Sequence[Span]) -> Tensor:
        methods = [self.slots[span.slot] for span in spans]
        masks = [self._dropout(x_TI, span, method) for span, method in zip(spans, methods, strict=True)]
        if all(isinstance(method, LoRA) for method in methods) and not any(mask is not None for mask in masks):
            pieces = [
                Piece(s.start, s.stop, i, m.scale * s.weight)
                for i, (s, m) in enumerate(zip(spans, methods, strict=True))
            ]
            return lora_linear(x_TI, self.base, pieces, [(m.a_RI, m.b_OR) for m in methods])
        return self._by_delta(x_TI, spans, methods, masks)

    def _by_delta(
        self, x_TI: Tensor, spans: Sequence[Span], methods: Sequence[Method], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """The general way, for any method and for dropout: one delta a span."""
        bias, y_TO = self.base.bias, self.base.linear(x_TI)
        parts = []
        for span, method, mask in zip(spans, methods, masks, strict=True):
            x, y = x_TI[span.start : span.stop], y_TO[span.start : span.stop]
            x = x if mask is None else x * mask
            delta = method.delta(x, y if bias is None else y - bias.to(y.dtype), self.base) * span.weight
            parts.append(F.pad(delta, (0, 0, span.start, x_TI.shape[0] - span.stop)))
        return y_TO + torch.stack(parts).sum(0)

    def _dropout(self, x_TI: Tensor, span: Span, method: Method) -> Tensor | None:
        """Inverted dropout mask for the method's input; None where nothing is dropped."""
        if method.dropout == 0.0:
            return None
        stream, rows = self.wiring.stream, span.stop - span.start
        if stream is not None:
            key = stream.dropout_keys.get(span.slot)
            return None if key is None else dropout_mask(key, self.path, rows, x_TI, method.dropout)
        # An ordinary call, as transformers.Trainer makes it: torch's own generator, in training mode only.
        return F.dropout(torch.ones_like(x_TI), method.dropout) if self.training else None

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
