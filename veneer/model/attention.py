"""Attention within segments of a packed stream, registered with transformers under its public interfaces.

Legend: T tokens, H query heads, K key-value heads, G = H / K, D head size; N segments of one bucket, L its longest.

CPU: short segments go through batched products with the softmax in float32 (`_Buckets`), because torch's flash backward
costs 2-4 ms a call however small the segment is; long ones (> SHORT) through torch's flash kernel, one call each.
CUDA in half precision: one varlen flash kernel over the whole stream; in float32 as on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from veneer.model.stream import Stream

ATTENTION = "veneer_packed"  # our name among transformers' attention implementations
SHORT = 640  # tokens; above it the (L, L) matrices cost more memory than the flash kernel's backward costs time


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
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.transpose(0, 1) for x in (q_HTD, _repeated(k_KTD, q_HTD), _repeated(v_KTD, q_HTD)))
    longest, starts = max(stream.lengths), stream.starts_S1
    return varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(-1, 0))


def _repeated(x_KTD: Tensor, q_HTD: Tensor) -> Tensor:
    """(K, T, D) -> (H, T, D): each key-value head once for every query head that shares it."""
    return x_KTD.repeat_interleave(q_HTD.shape[0] // x_KTD.shape[0], 0)


def _segments(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, stream: Stream, scale: float) -> Tensor:
    plan = stream.plans.get("attention") or stream.plans.setdefault("attention", _plan(stream))
    out_THD = q_HTD.new_empty(q_HTD.shape[1], q_HTD.shape[0], q_HTD.shape[2])
    if plan.flash or len(plan.buckets) > 1:
        parts = [(bucket.rows, _bucket(q_HTD, k_KTD, v_KTD, bucket, scale)) for bucket in plan.buckets]
        parts += [(rows, _flash(q_HTD, k_KTD, v_KTD, rows, scale)) for rows in plan.flash]
        order = torch.cat([rows for rows, _ in parts])
        return out_THD.index_copy(0, order, torch.cat([part for _, part in parts]))
    return _bucket(q_HTD, k_KTD, v_KTD, plan.buckets[0], scale)


class Bucket(NamedTuple):
    """Segments of like length, N of them, each padded to L: gathers both ways, never a scatter."""

    rows: Tensor  # the stream's rows of these segments, in order
    padded_NL: Tensor  # row of the stream for each padded place (the segment's last row repeated)
    places: Tensor  # place in N·L of each entry of `rows`
    masked_LL: Tensor  # True where the key comes after the query


class Plan(NamedTuple):
    buckets: list[Bucket]
    flash: list[Tensor]


def _plan(stream: Stream) -> Plan:
    """Short segments in buckets whose members are at least 3/5 of the longest; long ones alone."""
    short = sorted((i for i, n in enumerate(stream.lengths) if n <= SHORT), key=lambda i: -stream.lengths[i])
    groups: list[list[int]] = []
    for index in short:
        if groups and stream.lengths[index] * 5 >= stream.lengths[groups[-1][0]] * 3:
            groups[-1].append(index)
        else:
            groups.append([index])
    flash = [_rows(stream, [i]) for i, n in enumerate(stream.lengths) if n > SHORT]
    return Plan([_make_bucket(stream, sorted(group)) for group in groups], flash)


def _rows(stream: Stream, segments: list[int]) -> Tensor:
    rows = torch.cat([torch.arange(stream.starts[i], stream.starts[i + 1]) for i in segments])
    return rows.to(stream.token_ids_T.device)


def _make_bucket(stream: Stream, segments: list[int]) -> Bucket:
    longest = max(stream.lengths[i] for i in segments)
    steps = torch.arange(longest)
    padded = torch.stack([stream.starts[i] + steps.clamp(max=stream.lengths[i] - 1) for i in segments])
    places = torch.cat([n * longest + torch.arange(stream.lengths[i]) for n, i in enumerate(segments)])
    masked = torch.ones(longest, longest, dtype=torch.bool).triu(1)
    device = stream.token_ids_T.device
    return Bucket(_rows(stream, segments), padded.to(device), places.to(device), masked.to(device))


def _flash(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, rows: Tensor, scale: float) -> Tensor:
    start, stop = int(rows[0]), int(rows[-1]) + 1
    q, k, v = (x[None, :, start:stop] for x in (q_HTD, _repeated(k_KTD, q_HTD), _repeated(v_KTD, q_HTD)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)


def _bucket(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, bucket: Bucket, scale: float) -> Tensor:
    return _BucketAttention.apply(q_HTD, k_KTD, v_KTD, bucket, scale)


class _BucketAttention(torch.autograd.Function):
    """Causal attention of one bucket: (H, T, D), (K, T, D), (K, T, D) -> rows of the bucket (·, H, D).

    Padding sits after each segment's last token and repeats it, so a real query never sees it (causality), and what a
    padded query computes is never read. Query heads of one key head are stacked, so keys are not repeated.
    """

    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, bucket: Bucket, scale: float) -> Tensor:
        q, k, v = (
            _gather(q_HTD, k_KTD.shape[0], bucket),
            _gather(k_KTD, k_KTD.shape[0], bucket),
            _gather(v_KTD, k_KTD.shape[0], bucket),
        )
        groups = q.shape[1] // k.shape[1]
        # Scores in float32: rounded to bfloat16 they would be off by 1/256 of their size before the exponential.
        scores = torch.bmm(q.float() * scale, k.float().transpose(1, 2))
        scores.view(-1, groups, *bucket.masked_LL.shape).masked_fill_(bucket.masked_LL, float("-inf"))
        probs = torch.softmax(scores, -1).to(q.dtype)
        ctx.save_for_backward(q, k, v, probs)
        ctx.bucket, ctx.scale, ctx.shapes = bucket, scale, (q_HTD.shape, k_KTD.shape)
        return _ungather(torch.bmm(probs, v), q_HTD.shape, bucket)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        q, k, v, probs = ctx.saved_tensors
        bucket, (q_shape, k_shape) = ctx.bucket, ctx.shapes
        g = _regather(g, k_shape[0], bucket)
        dv = torch.bmm(probs.transpose(1, 2), g)
        dp = torch.bmm(g, v.transpose(1, 2)).float()
        ds = torch._softmax_backward_data(dp, probs.float(), -1, torch.float32).mul_(ctx.scale).to(q.dtype)
        dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)
        return *(_full(x, shape, bucket) for x, shape in ((dq, q_shape), (dk, k_shape), (dv, k_shape))), None, None


def _gather(x_HTD: Tensor, kv_heads: int, bucket: Bucket) -> Tensor:
    """(H, T, D) -> (N·K, G·L, D)."""
    (heads, _, size), (n, length) = x_HTD.shape, bucket.padded_NL.shape
    x = x_HTD.transpose(0, 1)[bucket.padded_NL.view(-1)].view(n, length, heads, size)
    return x.transpose(1, 2).reshape(n * kv_heads, (heads // kv_heads) * length, size)


def _ungather(x: Tensor, q_shape: torch.Size, bucket: Bucket) -> Tensor:
    """(N·K, G·L, D) -> the bucket's rows (·, H, D)."""
    n, length = bucket.padded_NL.shape
    x = x.view(n, q_shape[0], length, q_shape[2]).transpose(1, 2).reshape(n * length, q_shape[0], q_shape[2])
    return x[bucket.places]


def _regather(g: Tensor, kv_heads: int, bucket: Bucket) -> Tensor:
    """Gradient of `_ungather`: zero at the padding."""
    n, length = bucket.padded_NL.shape
    heads, size = g.shape[1:]
    padded = g.new_zeros(n * length, heads, size).index_copy_(0, bucket.places, g)
    return padded.view(n, length, heads, size).transpose(1, 2).reshape(n * kv_heads, (heads // kv_heads) * length, size)


def _full(x: Tensor, shape: torch.Size, bucket: Bucket) -> Tensor:
    """Gradient of `_gather`: the padding's share is zero, so rows are copied, not summed."""
    heads, tokens, size = shape
    rows = _ungather(x, shape, bucket)
    whole = len(bucket.rows) == tokens
    out = torch.empty_like(rows) if whole else rows.new_zeros(tokens, heads, size)
    return out.index_copy_(0, bucket.rows, rows).transpose(0, 1)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # segments are the mask
