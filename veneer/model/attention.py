"""Attention within the segments of a packed stream, registered with transformers under its public interfaces.

Legend: T tokens, H query heads, K key-value heads, G = H / K, D head size; N segments of one bucket, L its longest run
of queries, M its longest run of keys.

The queries of a segment are its own tokens, its keys those of its whole chain: of what it continues, and its own.

CPU: short segments go through batched products with the softmax in float32 (`Buckets`), because torch's flash backward
costs 2-4 ms a call however small the segment is; long ones (> SHORT²) through torch's flash kernel, one call each.
CUDA in half precision: one varlen flash kernel over the whole stream, or cuDNN's where all segments are of one length;
in float32 as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from veneer.model.stream import Stream, running_sums

ATTENTION = "veneer_packed"  # our name among transformers' attention implementations
# Tokens; a segment of more than SHORT² scores a head is long: they would cost more memory than the flash kernel's
# backward costs time.
SHORT = 640
# Scores a head whose computing takes as long as a bucket's dozen calls (measured: 12 to 14 thousand with 9 heads).
BUCKET = 12_000
CUDNN_SIZES = range(8, 129, 8)  # sizes of a head that cuDNN's kernel takes, forward and backward


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
        raise RuntimeError("the model's attention layers do not hand on keyword arguments, so the stream was lost")
    for setting in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(setting) is not None:
            raise NotImplementedError(f"packed attention does not know {setting}={kwargs[setting]!r}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    run = _varlen if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else _segments
    return run(query[0], key[0], value[0], stream, scale).unsqueeze(0), None


def _varlen(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, stream: Stream, scale: float) -> Tensor:
    plan = varlen_of(stream)
    if plan.equal and q_HTD.shape[-1] in CUDNN_SIZES and _cudnn_is_fastest(q_HTD.device.index):
        return _equal(q_HTD, k_KTD, v_KTD, plan.equal, scale)
    from torch.nn.attention.varlen import varlen_attn

    # Gathered in float32: what several segments send back to a shared row is summed there and rounded once.
    keys = (x if plan.keys is None else x.float().index_select(1, plan.keys).to(x.dtype) for x in (k_KTD, v_KTD))
    q, k, v = (x.transpose(0, 1) for x in (q_HTD, *keys))
    # Each segment's queries are the last of its keys: the kernel's causal mask is aligned at the end.
    settings: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if _groups_by_name():
        settings["enable_gqa"] = True
    return varlen_attn(q, k, v, plan.starts, plan.key_starts, plan.longest, plan.longest_keys, **settings)


# The two questions below are asked while a layer is traced. A cache on them would be seen through, and what they ask
# of the device would break the layer's graph in two.
@torch.compiler.assume_constant_result
def _groups_by_name() -> bool:
    """Whether leave to share a key-value head among query heads is asked for: by torch 2.12, not by 2.11."""
    return _takes_groups()


@cache
def _takes_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


@torch.compiler.assume_constant_result
def _cudnn_is_fastest(device: int) -> bool:
    return _has_fast_cudnn(device)


@cache
def _has_fast_cudnn(device: int) -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device)[0] >= 9


def _equal(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, length: int, scale: float) -> Tensor:
    """Segments of one length as a batch through cuDNN's kernel, nearly twice as fast as flash 2 on a H100."""
    # By token, as the projections wrote them: the kernel's output and gradients then lie by token too, ready for the
    # next product. Eager rotary keeps it so; the compiler would write by head, and copy later.
    by_token = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q_HTD, k_KTD, v_KTD))
    q, k, v = (x.unflatten(1, (-1, length)).transpose(0, 1) for x in by_token)
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out_NHLD = attend(q, k, v, None, True, 0.0, True, False, scale=scale)[0]
    return out_NHLD.transpose(1, 2).flatten(0, 1)


def varlen_of(stream: Stream) -> Varlen:
    """The stream's plan, made at the first question: before a compiled layer asks, which cannot make one."""
    if "varlen" not in stream.plans:
        stream.plans["varlen"] = varlen_plan(stream)
    return stream.plans["varlen"]


class Varlen(NamedTuple):
    """What the varlen kernel asks for."""

    starts: Tensor  # (S + 1) int32, of each segment's queries
    key_starts: Tensor  # (S + 1) int32, of its keys
    longest: int  # queries of a segment, at most
    longest_keys: int
    equal: int  # the length of every segment; 0: they differ, or see others' keys
    keys: Tensor | None  # which rows the keys are; None: the stream's own


def varlen_plan(stream: Stream) -> Varlen:
    device = stream.token_ids_T.device
    starts, key_starts = (
        torch.tensor(sums, dtype=torch.int32, device=device) for sums in (stream.starts, running_sums(stream.seen))
    )
    longest, longest_keys = max(stream.lengths), max(stream.seen)
    if not stream.branches:
        equal = longest if len(set(stream.lengths)) == 1 else 0
        return Varlen(starts, key_starts, longest, longest_keys, equal, None)
    rows = [row for segment in range(len(stream.lengths)) for row in stream.rows_of(segment)]
    return Varlen(starts, key_starts, longest, longest_keys, 0, torch.tensor(rows, device=device))


def _repeated(x_KTD: Tensor, q_HTD: Tensor) -> Tensor:
    """(K, T, D) -> (H, T, D): each key-value head once for every query head that shares it."""
    return x_KTD.repeat_interleave(q_HTD.shape[0] // x_KTD.shape[0], 0)


@torch.compiler.disable
def _segments(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, stream: Stream, scale: float) -> Tensor:
    kv_heads = k_KTD.shape[0]
    buckets = stream.plans.get(kv_heads) or stream.plans.setdefault(kv_heads, Buckets(stream, kv_heads))
    if buckets.members:
        out_THD = _BucketAttention.apply(q_HTD, k_KTD, v_KTD, buckets, scale)
    else:
        out_THD = torch.zeros_like(q_HTD.transpose(0, 1))
    for segment in buckets.long:
        rows = torch.arange(*stream.starts[segment : segment + 2], device=q_HTD.device)
        out_THD = out_THD.index_copy(0, rows, _flash(q_HTD, k_KTD, v_KTD, stream, segment, scale))
    return out_THD


def _flash(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, stream: Stream, segment: int, scale: float) -> Tensor:
    runs = [slice(*stream.starts[i : i + 2]) for i in stream.chains[segment]]
    q = q_HTD[None, :, runs[-1]]
    k, v = (_repeated(torch.cat([x[:, run] for run in runs], 1), q_HTD)[None] for x in (k_KTD, v_KTD))
    if len(runs) == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)
    # In the queries' dtype and one for all layers: torch would make a new one in each and keep it for backward.
    key = ("mask", segment, q.dtype)
    if key not in stream.plans:
        shape = (q.shape[2], k.shape[2])
        later = torch.full(shape, -torch.inf, dtype=q.dtype, device=q.device).triu(1 + shape[1] - shape[0])
        stream.plans[key] = later
    mask = stream.plans[key]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)


class Buckets:
    """The short segments in groups for batched products, worked out once a stream.

    A bucket is N segments of like size, their queries padded to L and their keys to M by repeating the last row. What a
    padded query computes is never read, and the mask hides padded keys with all others that come after a query.
    """

    def __init__(self, stream: Stream, kv_heads: int) -> None:
        sizes = list(zip(stream.lengths, stream.seen, strict=True))
        self.long = [i for i, (queries, keys) in enumerate(sizes) if queries * keys > SHORT**2]
        self.members = _groups([i for i, (queries, keys) in enumerate(sizes) if queries * keys <= SHORT**2], sizes)
        rows = [torch.tensor(stream.rows_of(i)) for i in range(len(sizes))]
        own = [rows[i][-n:] for i, n in enumerate(stream.lengths)]
        self.queries = Moves([[own[i] for i in group] for group in self.members], stream, kv_heads)
        self.keys = Moves([[rows[i] for i in group] for group in self.members], stream, kv_heads)
        self.masks = [self._mask([sizes[i] for i in group]).to(stream.token_ids_T.device) for group in self.members]

    def _mask(self, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """(N or 1, 1, 1, L, M): -inf where the key comes after the query, else 0."""
        (longest, longest_keys) = (max(both) for both in zip(*sizes, strict=True))
        before = sorted({keys - queries for queries, keys in sizes})
        before = before if len(before) == 1 else [keys - queries for queries, keys in sizes]
        last_seen = torch.tensor(before)[:, None, None] + torch.arange(longest)[:, None]
        later = torch.arange(longest_keys) > last_seen
        return torch.zeros(later.shape).masked_fill_(later, -torch.inf)[:, None, None]


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


class _BucketAttention(torch.autograd.Function):
    """Causal attention of all short segments: (H, T, D), (K, T, D), (K, T, D) -> (T, H, D), zero in long segments.

    Query heads that share a key head are stacked, so keys are not repeated.
    """

    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, buckets: Buckets, scale: float) -> Tensor:
        saved, outs = [], []
        gathered = (buckets.queries.gathered(q_HTD), buckets.keys.gathered(k_KTD), buckets.keys.gathered(v_KTD))
        for q, k, v, mask in zip(*gathered, buckets.masks, strict=True):
            # Scores in float32: rounded to bfloat16 they would be off by 1/256 of their size before the exponential.
            wide = torch.promote_types(q.dtype, torch.float32)
            scores = _scaled_bmm(q.to(wide), k.to(wide).transpose(1, 2), scale)
            scores.view(-1, k_KTD.shape[0], q_HTD.shape[0] // k_KTD.shape[0], *mask.shape[-2:]).add_(mask)
            probs = torch.softmax(scores, -1).to(q.dtype)
            out = torch.bmm(probs, v)
            outs.append(out)
            saved += [q, k, v, probs, out]
        ctx.save_for_backward(*saved)
        ctx.buckets, ctx.scale, ctx.heads = buckets, scale, (q_HTD.shape[0], k_KTD.shape[0])
        ctx.by_token = [lies_by_token(x) for x in (q_HTD, k_KTD, v_KTD)]
        return buckets.queries.summed(outs, q_HTD.shape[0], by_token=True).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, g_THD: Tensor) -> tuple[Any, ...]:
        buckets: Buckets = ctx.buckets
        dqs, dks, dvs = [], [], []
        saved = ctx.saved_tensors  # once: under checkpointing it may be read only once
        gs = buckets.queries.gathered(g_THD.transpose(0, 1))
        for i, (g, padding) in enumerate(zip(gs, buckets.queries.padding(g_THD.shape[1]), strict=True)):
            q, k, v, probs, out = saved[5 * i : 5 * i + 5]
            g.view(-1, g.shape[-1]).index_fill_(0, padding, 0.0)
            # Softmax backward, P ∘ (dP - rowsum(P ∘ dP)), where the row sum is g · out: D products instead of M.
            minus = torch.linalg.vecdot(g, out).neg_().unsqueeze(-1)
            ds = torch.baddbmm(minus, g, v.transpose(1, 2)).mul_(probs)
            dqs.append(_scaled_bmm(ds, k, ctx.scale))
            dks.append(_scaled_bmm(ds.transpose(1, 2), q, ctx.scale))
            dvs.append(torch.bmm(probs.transpose(1, 2), g))
        (heads, kv_heads), (q_by, k_by, v_by) = ctx.heads, ctx.by_token
        dq_HTD = buckets.queries.summed(dqs, heads, q_by)
        dk_KTD, dv_KTD = buckets.keys.summed(dks, kv_heads, k_by), buckets.keys.summed(dvs, kv_heads, v_by)
        return dq_HTD, dk_KTD, dv_KTD, None, None


def _scaled_bmm(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(x.new_empty(1), x, y, beta=0, alpha=scale)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # segments are the mask
