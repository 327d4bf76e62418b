"""Attention of a packed stream segment by segment: on the CPU, in float32, with caps and with sinks.

Legend: T tokens, H query heads, K key-value heads, G = H / K, D head size; N segments of one bucket, L its longest run
of queries, M its longest run of keys.

Short segments go through batched products with the softmax in float32 (`veneer.model.buckets`), because torch's flash
backward costs 2-4 ms a call however small the segment is; long ones (> SHORT²) through torch's flash kernel, one call
each, or one a block of queries where there is a window. What the flash kernel does not know, all goes through products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.model.buckets import Buckets, lies_by_token
from veneer.model.scores import Scores, hidden
from veneer.model.stream import Stream

# Tokens; a segment of more than SHORT² scores a head is long: they would cost more memory than the flash kernel's
# backward costs time.
SHORT = 640


@torch.compiler.disable
def attend_segments(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, stream: Stream, how: Scores) -> Tensor:
    """(H, T, D), (K, T, D), (K, T, D) -> (T, H, D)."""
    if stream.rounded:
        raise RuntimeError("attention by a stream's lengths on buffers, whose lengths are not the stream's")
    kv_heads, how = k_KTD.shape[0], how.within(max(stream.seen))
    plain = how.softcap is None and how.sinks_H is None  # what torch's flash kernel computes
    key = ("buckets", kv_heads, how.window, plain)
    if key not in stream.plans:
        stream.plans[key] = Buckets(stream, kv_heads, how.window, SHORT if plain else None)
    buckets = stream.plans[key]
    if buckets.members:
        out_THD = _BucketAttention.apply(q_HTD, k_KTD, v_KTD, buckets, how)
    else:
        out_THD = torch.zeros_like(q_HTD.transpose(0, 1))
    for segment in buckets.long:
        rows = torch.arange(*stream.starts[segment : segment + 2], device=q_HTD.device)
        out_THD = out_THD.index_copy(0, rows, _flash(q_HTD, k_KTD, v_KTD, stream, segment, how))
    return out_THD


def _flash(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, stream: Stream, segment: int, how: Scores) -> Tensor:
    runs = [slice(*stream.starts[i : i + 2]) for i in stream.chains[segment]]
    q = q_HTD[None, :, runs[-1]]
    k, v = (_repeated(torch.cat([x[:, run] for run in runs], 1), q_HTD)[None] for x in (k_KTD, v_KTD))
    queries, keys = q.shape[2], k.shape[2]
    if (window := how.within(keys).window) is not None:
        return _banded(q, k, v, stream, window, how.scale)
    if len(runs) == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=how.scale)[0].transpose(0, 1)
    mask = _mask_once(stream, queries, keys, keys, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=how.scale)[0].transpose(0, 1)


def _banded(q: Tensor, k: Tensor, v: Tensor, stream: Stream, window: int, scale: float) -> Tensor:
    """A long segment in blocks of queries, each with the keys that any of them sees."""
    queries, keys = q.shape[2], k.shape[2]
    parts = []
    for start in range(0, queries, SHORT):
        stop = min(start + SHORT, queries)
        last = keys - queries + stop
        first = max(0, last - (stop - start) - window + 1)
        mask = _mask_once(stream, stop - start, last - first, window, q)
        here = (q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last])
        parts.append(F.scaled_dot_product_attention(*here, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)[0].transpose(0, 1)


def _mask_once(stream: Stream, queries: int, keys: int, window: int, like: Tensor) -> Tensor:
    """In the queries' dtype and one for all layers: torch would make a new one in each and keep it for backward."""
    key = ("mask", queries, keys, window, like.dtype)
    if key not in stream.plans:
        unseen = hidden(torch.arange(keys - queries, keys, device=like.device)[:, None], keys, window)
        stream.plans[key] = torch.zeros(unseen.shape, dtype=like.dtype, device=like.device)
        stream.plans[key].masked_fill_(unseen, -torch.inf)
    return stream.plans[key]


def _repeated(x_KTD: Tensor, q_HTD: Tensor) -> Tensor:
    """(K, T, D) -> (H, T, D): each key-value head once for every query head that shares it."""
    return x_KTD.repeat_interleave(q_HTD.shape[0] // x_KTD.shape[0], 0)


class _BucketAttention(torch.autograd.Function):
    """Causal attention of all short segments: (H, T, D), (K, T, D), (K, T, D) -> (T, H, D), zero in long segments.

    Query heads that share a key head are stacked, so keys are not repeated.
    """

    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, buckets: Buckets, how: Scores) -> Tensor:
        saved, outs = [], []
        shared = (k_KTD.shape[0], q_HTD.shape[0] // k_KTD.shape[0])
        gathered = (buckets.queries.gathered(q_HTD), buckets.keys.gathered(k_KTD), buckets.keys.gathered(v_KTD))
        for q, k, v, mask in zip(*gathered, buckets.masks, strict=True):
            scores = _wide_scores(q, k, how.scale)
            if how.softcap is not None:
                scores = scores.div_(how.softcap).tanh_().mul_(how.softcap)
            scores.view(-1, *shared, *mask.shape[-2:]).add_(mask)
            probs = _softmax(scores, how.sinks_H, (*shared, mask.shape[-2])).to(q.dtype)
            out = torch.bmm(probs, v)
            outs.append(out)
            saved += [q, k, v, probs, out]
        ctx.save_for_backward(*saved)
        ctx.buckets, ctx.how, ctx.heads = buckets, how, (q_HTD.shape[0], k_KTD.shape[0])
        ctx.by_token = [lies_by_token(x) for x in (q_HTD, k_KTD, v_KTD)]
        return buckets.queries.summed(outs, q_HTD.shape[0], by_token=True).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, g_THD: Tensor) -> tuple[Any, ...]:
        buckets: Buckets = ctx.buckets
        how: Scores = ctx.how
        dqs, dks, dvs = [], [], []
        saved = ctx.saved_tensors  # once: under checkpointing it may be read only once
        gs = buckets.queries.gathered(g_THD.transpose(0, 1))
        for i, (g, padding) in enumerate(zip(gs, buckets.queries.padding(g_THD.shape[1]), strict=True)):
            q, k, v, probs, out = saved[5 * i : 5 * i + 5]
            g.view(-1, g.shape[-1]).index_fill_(0, padding, 0.0)
            # Softmax backward, P ∘ (dP - rowsum(P ∘ dP)), where the row sum is g · out: D products instead of M. A
            # sink, whose value is zero, adds nothing to either.
            minus = torch.linalg.vecdot(g, out).neg_().unsqueeze(-1)
            ds = torch.baddbmm(minus, g, v.transpose(1, 2)).mul_(probs)
            if how.softcap is not None:
                capped = _wide_scores(q, k, how.scale / how.softcap).tanh_()
                ds = ds.mul_(1 - capped.square_())
            dqs.append(_scaled_bmm(ds, k, how.scale))
            dks.append(_scaled_bmm(ds.transpose(1, 2), q, how.scale))
            dvs.append(torch.bmm(probs.transpose(1, 2), g))
        (heads, kv_heads), (q_by, k_by, v_by) = ctx.heads, ctx.by_token
        dq_HTD = buckets.queries.summed(dqs, heads, q_by)
        dk_KTD, dv_KTD = buckets.keys.summed(dks, kv_heads, k_by), buckets.keys.summed(dvs, kv_heads, v_by)
        return dq_HTD, dk_KTD, dv_KTD, None, None


def _wide_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """In float32: rounded to bfloat16 they would be off by 1/256 of their size before the exponential."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return _scaled_bmm(q.to(wide), k.to(wide).transpose(1, 2), scale)


def _softmax(scores: Tensor, sinks_H: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
    """Over the last dimension of (N · K, G · L, M); with sinks each row has one more score, which is left out again.
    shape: K, G, L."""
    if sinks_H is None:
        return torch.softmax(scores, -1)
    kv_heads, groups, queries = shape
    sinks = sinks_H.to(scores.dtype).view(1, kv_heads, groups, 1).expand(len(scores) // kv_heads, -1, -1, queries)
    return torch.softmax(torch.cat([scores, sinks.reshape(*scores.shape[:2], 1)], -1), -1)[..., :-1]


def _scaled_bmm(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(x.new_empty(1), x, y, beta=0, alpha=scale)
