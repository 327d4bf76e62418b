"""A stream: many sequences laid end to end in one row of tokens, no padding, and who speaks where.

Legend: T tokens of the stream, S segments, N sequences.

A sequence is one segment, or a chain of segments when it shares its beginning with others (a system prompt, a tool
list, the prompt of a preference pair): the shared tokens stand in the stream once, as a segment that others continue.
A causal model computes the same for them in every sequence, so results are the same and the work is less
(Wang & Hegde 2024, arXiv 2410.20305, for preference pairs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

EVEN = 32  # tokens; matrix units work on tiles of 16 to 64 rows, and a broken one may cost half the speed of a product
SHARED = 16  # tokens; a shorter common beginning costs more in one more segment than it saves


class Span(NamedTuple):
    """Rows start:stop of the stream meet one slot with one weight; spans may overlap."""

    start: int
    stop: int
    slot: str
    weight: float = 1.0


class Segment(NamedTuple):
    """A run of tokens that nothing else stands between, continuing segment number `parent` (None: from nothing)."""

    tokens: Sequence[int]
    parent: int | None


@dataclasses.dataclass(frozen=True)
class Stream:
    """Sequences laid end to end, and who speaks where."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64, from 0 in every sequence
    lengths: tuple[int, ...]  # tokens of each segment, S of them; their sum is T
    spans: tuple[Span, ...] = ()
    dropout_keys: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # slot -> key of this step; absent: no dropout
    parents: tuple[int | None, ...] = ()  # what each segment continues, an earlier one; empty: none continues another
    last: tuple[int, ...] = ()  # the segment each sequence ends in, N of them; empty: sequence i is segment i
    # Whether other streams are copied into this one: then `lengths` is not theirs, and the plan on the device tells.
    rounded: bool = False

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where segments start, and T at the end."""
        return running_sums(self.lengths)

    @cached_property
    def chains(self) -> tuple[tuple[int, ...], ...]:
        """For each segment all that it continues, the first first, and itself: whose tokens its tokens see."""
        chains: list[tuple[int, ...]] = []
        for segment, parent in enumerate(self.parents or [None] * len(self.lengths)):
            chains.append((*(() if parent is None else chains[parent]), segment))
        return tuple(chains)

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """For each segment the tokens of its whole chain: how many its last token sees."""
        begins = _begins(self.lengths, self.parents or [None] * len(self.lengths))
        return tuple(begin + n for begin, n in zip(begins, self.lengths, strict=True))

    @property
    def branches(self) -> bool:
        """Whether any segment continues another."""
        return any(parent is not None for parent in self.parents)

    def rows_of(self, segment: int) -> list[int]:
        """Where the tokens of a segment's whole chain stand in the stream."""
        return [row for i in self.chains[segment] for row in range(self.starts[i], self.starts[i + 1])]

    @property
    def sequences(self) -> tuple[int, ...]:
        """The segment each sequence ends in."""
        return self.last or tuple(range(len(self.lengths)))

    @cached_property
    def plans(self) -> dict:
        """What kernels compute once from the lengths and use in every layer."""
        return {}


def running_sums(lengths: Sequence[int]) -> tuple[int, ...]:
    """0 and the sums up to each length: where runs of these lengths start, and where the last one stops."""
    return (0, *accumulate(lengths))


def pack(
    sequences: Sequence[Sequence[int]],
    slots: Sequence[str | None] | None = None,
    device: torch.device | str = "cpu",
    dropout_keys: dict[str, int] | None = None,
    share: bool = False,
    multiple: int = 1,
) -> Stream:
    """Lays sequences of token ids end to end; slots[i] speaks over sequence i (None: the base alone).

    Neighbours of one slot share a span, so keep a slot's sequences together. With `share`, neighbours of one slot that
    begin alike share those tokens too, unless the slot has dropout (each sequence draws its own). With `multiple`, a
    segment that no sequence holds fills the stream up to a multiple of so many tokens.
    """
    if not sequences or not all(sequences):
        raise ValueError(f"pack: every sequence needs at least one token, got lengths {[len(s) for s in sequences]}")
    slots, keys = slots or [None] * len(sequences), dict(dropout_keys or {})
    segments: list[Segment] = []
    owners: list[str | None] = []
    last: list[int] = []
    for slot, neighbours in groupby(zip(slots, sequences, strict=True), key=lambda pair: pair[0]):
        group, before = [sequence for _, sequence in neighbours], len(segments)
        made, ends = shared(group) if share and slot not in keys else (_apart(group), range(len(group)))
        segments += [s if s.parent is None else Segment(s.tokens, s.parent + before) for s in made]
        owners += [slot] * len(made)
        last += [before + end for end in ends]
    if missing := -sum(len(segment.tokens) for segment in segments) % multiple:
        segments.append(Segment([0] * missing, None))
        # To the last slot (a single one then has products of even size), with zero gradients; no mask is drawn for it.
        owners.append(None if owners[-1] in keys else owners[-1])
    ids = torch.tensor([token for segment in segments for token in segment.tokens], dtype=torch.int64)
    lengths = tuple(len(segment.tokens) for segment in segments)
    parents = tuple(segment.parent for segment in segments)
    begins = _begins(lengths, parents)
    positions = torch.cat([torch.arange(n) + begin for n, begin in zip(lengths, begins, strict=True)])
    return Stream(ids.to(device), positions.to(device), lengths, _spans(lengths, owners), keys, parents, tuple(last))


def mixed(stream: Stream, weights: Mapping[str, float]) -> Stream:
    """The same tokens, with these slots speaking over all of them at a time, each with its weight."""
    spans = tuple(Span(0, len(stream.token_ids_T), slot, weight) for slot, weight in weights.items())
    return dataclasses.replace(stream, spans=spans)


def _begins(lengths: Sequence[int], parents: Sequence[int | None]) -> list[int]:
    """The position of each segment's first token."""
    begins: list[int] = []
    for parent in parents:
        begins.append(0 if parent is None else begins[parent] + lengths[parent])
    return begins


def shared(sequences: Sequence[Sequence[int]]) -> tuple[list[Segment], list[int]]:
    """The tree of common beginnings: its segments, each after what it continues, and where each sequence ends."""
    segments: list[Segment] = []
    ends = [0] * len(sequences)

    def add(tokens: Sequence[int], parent: int | None) -> int:
        segments.append(Segment(tokens, parent))
        return len(segments) - 1

    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    common = [_common(sequences[a], sequences[b]) for a, b in pairwise(order)]
    # Runs of `order` that agree on `depth` tokens, which end in segment `parent`. A stack: trees may be deep.
    runs: list[tuple[int, int, int, int | None]] = [(0, len(order), 0, None)]
    while runs:
        begin, end, depth, parent = runs.pop()
        cuts = [begin, *(i + 1 for i in range(begin, end - 1) if common[i] < depth + SHARED), end]
        for start, stop in pairwise(cuts):
            first = sequences[order[start]]
            if stop - start > 1:
                branch = min(common[start : stop - 1])
                runs.append((start, stop, branch, add(first[depth:branch], parent)))
            elif parent is not None and len(first) == depth:
                ends[order[start]] = parent
            else:
                ends[order[start]] = add(first[depth:], parent)
    return segments, ends


def _apart(sequences: Sequence[Sequence[int]]) -> list[Segment]:
    return [Segment(sequence, None) for sequence in sequences]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _spans(lengths: Sequence[int], slots: Sequence[str | None]) -> tuple[Span, ...]:
    spans: list[Span] = []
    start = 0
    for length, slot in zip(lengths, slots, strict=True):
        stop = start + length
        if slot is not None and spans and spans[-1].slot == slot and spans[-1].stop == start:
            spans[-1] = Span(spans[-1].start, stop, slot)
        elif slot is not None:
            spans.append(Span(start, stop, slot))
        start = stop
    return tuple(spans)
