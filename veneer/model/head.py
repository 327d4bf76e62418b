"""The vocabulary head: a linear layer, and in some families a scale or a cap on what it gives.

Legend: D hidden size, V vocabulary.

Which of them a family has stands in its config; the probe at load finds those that it does not tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.model.text import text_config
from veneer.model.vocabulary import HeadLeaf

# name in the config -> factor of the logits
_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": float,  # Cohere
    "logits_scaling": lambda divisor: 1.0 / divisor,  # Granite
    "lm_head_multiplier": float,  # Falcon-H1
}
_SOFTCAP = "final_logit_softcapping"  # Gemma 2, arXiv 2408.00118


class Head(NamedTuple):
    """logits = softcap · tanh(scale · linear(hidden) / softcap); without a cap, scale · linear(hidden)."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        return self.shaped(self.linear(hidden))[0]

    def logits(self, hidden_MD: Tensor, rows_M: Tensor | None = None) -> Tensor:
        """Logits (M, V) of hidden states (M, D), which stand at rows_M of the running stream, if one runs."""
        hidden_MD = hidden_MD.to(self.linear.weight.dtype)
        if isinstance(self.linear, HeadLeaf):
            return self.shaped(self.linear.logits(hidden_MD, rows_M))[0]
        return self.shaped(nn.functional.linear(hidden_MD, self.linear.weight, self.linear.bias))[0]

    @property
    def speaks(self) -> bool:
        """Whether a slot changes the logits now."""
        return isinstance(self.linear, HeadLeaf) and bool(self.linear.speakers())

    def shaped(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scaled and capped; and the slope of the cap where it is, None where there is none."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        if self.softcap is None:
            return logits, None
        bent = torch.tanh(logits / self.softcap)
        return bent * self.softcap, 1 - bent * bent


def head_of(model: Any) -> Head:
    """The model's head, as its config tells."""
    config = text_config(model)
    scale = 1.0
    for name, factor in _SCALES.items():
        if value := getattr(config, name, None):
            scale *= factor(value)
    return Head(model.get_output_embeddings(), scale, getattr(config, _SOFTCAP, None))
