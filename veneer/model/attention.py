"""Attention within the segments of a packed stream, registered with transformers under its public interfaces.

Legend: T tokens, H query heads, K key-value heads, D head size.

The queries of a segment are its own tokens, its keys those of its whole chain: of what it continues, and its own. Some
families look back no further than a window, cap scores, or let each head attend to nothing (`veneer.model.scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from veneer.model.scores import Scores
from veneer.model.segments import attend_segments
from veneer.model.varlen import attend_varlen

ATTENTION = "veneer_packed"  # our name among transformers' attention implementations


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D)."""
    stream = kwargs.get("veneer_stream")
    if stream is None:
        stream = getattr(getattr(module, "veneer_wiring", None), "stream", None)
    if stream is None:
        raise RuntimeError("the model's attention layers do not hand on keyword arguments, so the stream was lost")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = Scores(scale, kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux"))
    if _witness is not None:
        _witness.see(attention_mask, how.window)
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    plain = how.softcap is None and how.sinks_H is None
    wiring = getattr(module, "veneer_wiring", None)
    if wiring is not None and not plain:
        wiring.by_lengths = True  # on any device: the probe at load tells
    run = attend_varlen if half and plain else attend_segments
    return run(query[0], key[0], value[0], stream, how).unsqueeze(0), None


class Witness:
    """Layers whose mask hides keys that they do not tell packed attention of: it never sees a mask."""

    def __init__(self) -> None:
        self.untold: set[str] = set()
        self.calls = 0

    def see(self, mask: Tensor | None, window: int | None) -> None:
        """One layer's call."""
        self.calls += 1
        meant = getattr(mask, "veneer_window", window)
        if meant != window:
            self.untold.add(f"local attention over {meant}" if isinstance(meant, int) else str(meant))


_witness: Witness | None = None


@contextmanager
def witnessed() -> Iterator[Witness]:
    """While inside, masks are what they are not elsewhere: something that tells what they mean."""
    global _witness
    _witness = Witness()
    try:
        yield _witness
    finally:
        _witness = None


def _no_mask(
    *_unused: Any, mask_function: Callable[..., Any] | None = None, local_size: int | None = None, **more: Any
) -> Tensor | None:
    """Segments are the mask."""
    if _witness is None or mask_function is None:
        return None
    mask = torch.zeros(1, 1, int(more.get("q_length", 1)), int(more.get("kv_length", 1)))
    mask.veneer_window = _window_of(mask_function, local_size)
    return mask


def _window_of(mask_function: Callable[..., Any], window: int | None) -> int | str | None:
    """What transformers' function of a query's and a key's position is, far from the beginning."""
    query = 4 * (window or 2**16)

    def sees(key: int) -> bool:
        return bool(mask_function(*(torch.tensor(index) for index in (0, 0, query, key))))

    oldest = query - window + 1 if window else 0
    try:
        if sees(query) and sees(oldest) and not sees(query + 1) and (oldest == 0 or not sees(oldest - 1)):
            return window
    except IndexError:  # it asks a table as long as this call
        pass
    return f"a mask of its own (size {window})"


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
