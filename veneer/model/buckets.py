"""The short segments of a stream in groups for batched products.

Legend: T tokens, H query heads, K key-value heads, G = H / K, D head size; N segments of one bucket, L its longest run
of queries, M its longest run of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.model.scores import hidden
from veneer.model.stream import Stream

# Scores a head whose computing takes as long as a bucket's dozen calls (measured: 12 to 14 thousand with 9 heads).
BUCKET = 12_000


class Buckets:
    """The short segments in groups for batched products, worked out once a stream.

    A bucket is N segments of like size, their queries padded to L and their keys to M by repeating the last row. What a
    padded query computes is never read, and the mask hides padded keys with all others that come after a query.
    """

    def __init__(self, stream: Stream, kv_heads: int, window: int | None = None, short: int | None = None) -> None:
        """short: segments of more than its square of scores are left out, as `long`; None: none are."""
        sizes = list(zip(stream.lengths, stream.seen, strict=True))
        self.window = window
        self.long = [i for i, (queries, keys) in enumerate(sizes) if short is not None and queries * keys > short**2]
        self.members = _groups([i for i in range(len(sizes)) if i not in set(self.long)], sizes)
        rows = [torch.tensor(stream.rows_of(i)) for i in range(len(sizes))]
        own = [rows[i][-n:] for i, n in enumerate(stream.lengths)]
        self.queries = Moves([[own[i] for i in group] for group in self.members], stream, kv_heads)
        self.keys = Moves([[rows[i] for i in group] for group in self.members], stream, kv_heads)
        self.masks = [self._mask([sizes[i] for i in group]).to(stream.token_ids_T.device) for group in self.members]

    def _mask(self, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(N or 1, 1, 1, L, M): -inf where the query does not see the key, else 0."""
        (longest, longest_keys) = (max(both) for both in zip(*sizes, strict=True))
        before = sorted({keys - queries for queries, keys in sizes})
        before = before if len(before) == 1 else [keys - queries for queries, keys in sizes]
        # A padded query sees as much as the last one: with a window it would see nothing, and softmax give NaN.
        last_seen = (torch.tensor(before)[:, None, None] + torch.arange(longest)[:, None]).clamp(max=longest_keys - 1)
        unseen = hidden(last_seen, longest_keys, self.window)
        return torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None, None]


class Moves:
    """Rows of the stream's tensors into buckets and back: one gather each way, forward and backward, whether the
    stream's tensor lies by head (H, T, D) or by token (T, H, D). Rows of a bucket are in the order (N, K, G, L).
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], stream: Stream, kv_heads: int) -> None:
        self.tokens, self.kv_heads, self.device = len(stream.token_ids_T), kv_heads, stream.token_ids_T.device
        self.rows = [_padded(group) for group in groups]  # (N, L) each
        self.real = [_real(group) for group in groups]  # (N, L) each: False at padding
        self._known: dict[tuple[str, int, bool], Any] = {}

    def gathered(self, x_HTD: Tensor) -> list[Tensor]:
        """(H, T, D) -> for each bucket (N · K, G · L, D)."""
        heads, _, size = x_HTD.shape
        by_token = lies_by_token(x_HTD)
        flat = (x_HTD.transpose(0, 1) if by_token else x_HTD).reshape(-1, size)
        indices = self._once("gather", heads, by_token, self._gathers)
        return [
            flat.index_select(0, index).view(len(rows) * self.kv_heads, -1, size)
            for index, rows in zip(indices, self.rows, strict=True)
        ]

    def summed(self, parts: Sequence[Tensor], heads: int, by_token: bool) -> Tensor:
        """The buckets' rows back in the stream's order, (H, T, D): a row in several buckets is summed over them, one in
        none is zero."""
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        places, bags = self._once("back", heads, by_token, self._back)
        # A bag sums in float32 and rounds once.
        rows = flat.index_select(0, places) if bags is None else torch.embedding_bag(flat, places, bags)[0]
        if by_token:
            return rows.view(self.tokens, heads, -1).transpose(0, 1)
        return rows.view(heads, self.tokens, -1)

    def padding(self, heads: int) -> list[Tensor]:
        """For each bucket: the rows of (N, K, G, L) that are padding."""
        return self._once("padding", heads, False, self._padding)

    def _once(self, what: str, heads: int, by_token: bool, make: Callable[[int, bool], Any]) -> Any:
        key = (what, heads, by_token)
        if key not in self._known:
            self._known[key] = [x if x is None else x.to(self.device) for x in make(heads, by_token)]
        return self._known[key]

    def _gathers(self, heads: int, by_token: bool) -> list[Tensor]:
        """For each bucket: rows of the flat (H · T, D) or (T · H, D) tensor."""
        flat = torch.arange(heads * self.tokens)
        ids_TH = flat.view(self.tokens, heads) if by_token else flat.view(heads, self.tokens).t()
        return [ids_TH[rows_NL].transpose(1, 2).reshape(-1) for rows_NL in self.rows]

    def _back(self, heads: int, by_token: bool) -> tuple[Tensor, Tensor | None]:
        """Places among all buckets' rows in the order of the stream's rows; where each row's begin, None: one each."""
        kept = torch.cat([_each_head(real_NL, heads) for real_NL in self.real])
        places = kept.nonzero().squeeze(1)
        wanted = torch.cat(self._gathers(heads, by_token))[places]
        counts = torch.bincount(wanted, minlength=heads * self.tokens)
        places = places[wanted.argsort(stable=True)]
        return places, (None if bool((counts == 1).all()) else counts.cumsum(0) - counts)

    def _padding(self, heads: int, by_token: bool) -> list[Tensor]:
        return [(~_each_head(real_NL, heads)).nonzero().squeeze(1) for real_NL in self.real]


def lies_by_token(x_HTD: Tensor) -> bool:
    return not x_HTD.is_contiguous()


def _each_head(x_NL: Tensor, heads: int) -> Tensor:
    """(N, L) -> flat (N, H, L)."""
    return x_NL[:, None].expand(-1, heads, -1).reshape(-1)


def _groups(segments: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Buckets: a segment joins the one where it adds the fewest scores, unless a bucket of its own costs less."""
    groups: list[list[int]] = []
    most: list[tuple[int, int]] = []  # queries and keys of each group's largest members
    for index in sorted(segments, key=lambda i: sizes[i], reverse=True):
        queries, keys = sizes[index]
        joined = [(max(queries, most_queries), max(keys, most_keys)) for most_queries, most_keys in most]
        added = [
            (len(group) + 1) * new[0] * new[1] - len(group) * old[0] * old[1]
            for group, new, old in zip(groups, joined, most, strict=True)
        ]
        if added and min(added) <= queries * keys + BUCKET:
            best = added.index(min(added))
            groups[best].append(index)
            most[best] = joined[best]
        else:
            groups.append([index])
            most.append(sizes[index])
    return groups


def _padded(group: Sequence[Tensor]) -> Tensor:
    longest = max(len(rows) for rows in group)
    return torch.stack([rows[torch.arange(longest).clamp(max=len(rows) - 1)] for rows in group])


def _real(group: Sequence[Tensor]) -> Tensor:
    longest = max(len(rows) for rows in group)
    return torch.stack([torch.arange(longest) < len(rows) for rows in group])
