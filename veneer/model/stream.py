"""A stream: many sequences laid end to end in one row of tokens, no padding, and who speaks where.

Legend: T tokens of the stream, S segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Rows start:stop of the stream meet one slot with one weight; spans may overlap."""

    start: int
    stop: int
    slot: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Stream:
    """Sequences laid end to end, and who speaks where."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64, from 0 in every segment
    lengths: tuple[int, ...]  # tokens of each segment, S of them; their sum is T
    spans: tuple[Span, ...] = ()
    dropout_keys: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # slot -> key of this step; absent: no dropout

    @cached_property
    def starts_S1(self) -> Tensor:
        """Where segments start, and T at the end: int32, on the stream's device (the layout of varlen kernels)."""
        ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.token_ids_T.device)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The same as Python integers."""
        starts, total = [0], 0
        for length in self.lengths:
            total += length
            starts.append(total)
        return tuple(starts)

    @cached_property
    def plans(self) -> dict:
        """What kernels compute once from the lengths and use in every layer."""
        return {}


def pack(
    sequences: Sequence[Sequence[int]],
    slots: Sequence[str | None] | None = None,
    device: torch.device | str = "cpu",
    dropout_keys: dict[str, int] | None = None,
) -> Stream:
    """Lays sequences of token ids end to end; slots[i] speaks over sequence i (None: the base alone).

    Neighbours of one slot share a span, so keep a slot's sequences together.
    """
    lengths = tuple(len(sequence) for sequence in sequences)
    if not lengths or 0 in lengths:
        raise ValueError(f"pack: every sequence needs at least one token, got lengths {lengths}")
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Stream(ids.to(device), positions.to(device), lengths, _spans(lengths, slots), dict(dropout_keys or {}))


def _spans(lengths: Sequence[int], slots: Sequence[str | None] | None) -> tuple[Span, ...]:
    spans: list[Span] = []
    start = 0
    for length, slot in zip(lengths, slots or [None] * len(lengths), strict=True):
        stop = start + length
        if slot is not None and spans and spans[-1].slot == slot and spans[-1].stop == start:
            spans[-1] = Span(spans[-1].start, stop, slot)
        elif slot is not None:
            spans.append(Span(start, stop, slot))
        start = stop
    return tuple(spans)
