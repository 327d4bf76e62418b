"""What becomes of a score q · k before the softmax, beside its scale: a window, a cap, a sink.

Legend: H query heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """What becomes of q · k."""

    scale: float
    window: int | None = None  # keys that a query sees at most, its own among them
    softcap: float | None = None  # Gemma 2, arXiv 2408.00118
    sinks_H: Tensor | None = None  # Xiao et al. 2023, arXiv 2309.17453, with a learned score

    def within(self, keys: int) -> Scores:
        """The same for at most so many keys: a window that holds them all is none."""
        return self if self.window is None or self.window < keys else self._replace(window=None)


def hidden(last_seen: Tensor, keys: int, window: int | None) -> Tensor:
    """(..., keys): whether a key comes after the last that a query sees, or before its window."""
    at = torch.arange(keys, device=last_seen.device)
    later = at > last_seen
    return later if window is None else later | (at <= last_seen - window)
