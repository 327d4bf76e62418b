"""Attention within segments of a packed stream, registered with transformers under its public interfaces.

Legend: T tokens, H query heads, K key-value heads, G = H / K, D head size; N segments of one bucket, L its longest.

CPU: short segments go through batched products with the softmax in float32 (`_Buckets`), because torch's flash backward
costs 2-4 ms a call however small the segment is; long ones (> SHORT) through torch's flash kernel, one call each.
CUDA in half precision: one varlen flash kernel over the whole stream; in float32 as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    kv_heads = k_KTD.shape[0]
    buckets = stream.plans.get(kv_heads) or stream.plans.setdefault(kv_heads, Buckets(stream, kv_heads))
    if buckets.rows:
        out_THD = _BucketAttention.apply(q_HTD, k_KTD, v_KTD, buckets, scale)
    else:
        out_THD = torch.zeros_like(q_HTD.transpose(0, 1))
    for segment in buckets.long:
        out_THD = out_THD.index_copy(0, segment, _flash(q_HTD, k_KTD, v_KTD, segment, scale))
    return out_THD


def _flash(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, segment: Tensor, scale: float) -> Tensor:
    rows = slice(int(segment[0]), int(segment[-1]) + 1)
    q, k, v = (x[None, :, rows] for x in (q_HTD, _repeated(k_KTD, q_HTD), _repeated(v_KTD, q_HTD)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)


class Buckets:
    """How the segments of a stream are gathered for batched products: row numbers, worked out once a stream.

    A bucket is N segments of like length, each padded to L by repeating its last row. Padding comes after every real
    token, so no real query sees it, and what it computes is never read. Every move between the stream and a bucket's
    (K, N, G, L, D) is one gather of rows of head size D, forward and backward, whether the stream's tensor lies by
    head (H, T, D) or by token (T, H, D).
    """

    def __init__(self, stream: Stream, kv_heads: int) -> None:
        self.tokens, self.kv_heads, self.device = len(stream.token_ids_T), kv_heads, stream.token_ids_T.device
        groups = _like_lengths([i for i, n in enumerate(stream.lengths) if n <= SHORT], stream.lengths)
        self.rows = [_padded(stream, group) for group in groups]  # (N, L) each
        self.real = [_real(stream, group) for group in groups]  # (N, L) each: False at padding
        self.shapes = [tuple(rows.shape) for rows in self.rows]
        long = [i for i, n in enumerate(stream.lengths) if n > SHORT]
        self.long = [torch.arange(*stream.starts[i : i + 2], device=self.device) for i in long]
        self._known: dict[tuple[str, int, bool], list[Tensor]] = {}

    def gathers(self, heads: int, by_token: bool) -> list[Tensor]:
        """For each bucket: the rows of a flat (H · T, D) or (T · H, D) tensor in the order (K, N, G, L)."""
        return self._once("gather", heads, by_token, self._gathers)

    def back(self, heads: int, by_token: bool) -> Tensor:
        """For each (head, token) or (token, head): its row among all buckets' (K, N, G, L); 0 for long segments."""
        return self._once("back", heads, by_token, self._back)[0]

    def later(self, heads: int) -> list[Tensor]:
        """For each bucket (G · L, L): -inf where the key comes after the query, else 0."""
        return self._once("later", heads, False, self._later)

    def padding(self, heads: int) -> list[Tensor]:
        """For each bucket: the rows of (K, N, G, L) that are padding."""
        return self._once("padding", heads, False, self._padding)

    def _once(self, what: str, heads: int, by_token: bool, make: Callable[[int, bool], list[Tensor]]) -> list[Tensor]:
        key = (what, heads, by_token)
        if key not in self._known:
            self._known[key] = [index.to(self.device) for index in make(heads, by_token)]
        return self._known[key]

    def _gathers(self, heads: int, by_token: bool) -> list[Tensor]:
        flat = torch.arange(heads * self.tokens)
        ids_HT = flat.view(self.tokens, heads).t() if by_token else flat.view(heads, self.tokens)
        return [self._ordered(ids_HT[:, rows_NL]) for rows_NL in self.rows]

    def _back(self, heads: int, by_token: bool) -> list[Tensor]:
        places = torch.zeros(heads * self.tokens, dtype=torch.int64)
        start = 0
        for index, real_NL in zip(self._gathers(heads, by_token), self.real, strict=True):
            kept = self._ordered(real_NL.expand(heads, *real_NL.shape))
            places[index[kept]] = start + torch.arange(len(index))[kept]
            start += len(index)
        return [places]

    def _later(self, heads: int, by_token: bool) -> list[Tensor]:
        groups = heads // self.kv_heads
        return [torch.full((n, n), -torch.inf).triu(1).repeat(groups, 1) for _, n in self.shapes]

    def _padding(self, heads: int, by_token: bool) -> list[Tensor]:
        ordered = [self._ordered(real_NL.expand(heads, *real_NL.shape)) for real_NL in self.real]
        return [(~real).nonzero().squeeze(1) for real in ordered]

    def _ordered(self, x_HNL: Tensor) -> Tensor:
        """(H, N, L) -> flat (K, N, G, L)."""
        heads, n, length = x_HNL.shape
        return x_HNL.reshape(self.kv_heads, heads // self.kv_heads, n, length).transpose(1, 2).reshape(-1)


def _like_lengths(segments: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Groups whose members are at least 3/5 of their longest."""
    groups: list[list[int]] = []
    for index in sorted(segments, key=lambda i: -lengths[i]):
        if groups and lengths[index] * 5 >= lengths[groups[-1][0]] * 3:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _padded(stream: Stream, group: Sequence[int]) -> Tensor:
    steps = torch.arange(stream.lengths[group[0]])
    return torch.stack([stream.starts[i] + steps.clamp(max=stream.lengths[i] - 1) for i in group])


def _real(stream: Stream, group: Sequence[int]) -> Tensor:
    steps = torch.arange(stream.lengths[group[0]])
    return torch.stack([steps < stream.lengths[i] for i in group])


class _BucketAttention(torch.autograd.Function):
    """Causal attention of all short segments: (H, T, D), (K, T, D), (K, T, D) -> (T, H, D).

    Query heads that share a key head are stacked, so keys are not repeated. Rows of long segments come out undefined,
    with gradient zero.
    """

    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, buckets: Buckets, scale: float) -> Tensor:
        saved, outs = [], []
        gathered = (_gathered(x, buckets) for x in (q_HTD, k_KTD, v_KTD))
        masks = buckets.later(q_HTD.shape[0])
        for q, k, v, later_XL in zip(*gathered, masks, strict=True):
            # Scores in float32: rounded to bfloat16 they would be off by 1/256 of their size before the exponential.
            wide = torch.promote_types(q.dtype, torch.float32)
            scores = torch.baddbmm(later_XL.to(wide), q.to(wide), k.to(wide).transpose(1, 2), alpha=scale)
            probs = torch.softmax(scores, -1).to(q.dtype)
            out = torch.bmm(probs, v)
            outs.append(out.view(-1, q.shape[-1]))
            saved += [q, k, v, probs, out]
        ctx.save_for_backward(*saved)
        ctx.buckets, ctx.scale, ctx.heads = buckets, scale, (q_HTD.shape[0], k_KTD.shape[0], k_KTD.shape[0])
        ctx.by_token = [_lies_by_token(x) for x in (q_HTD, k_KTD, v_KTD)]
        return _returned(outs, buckets, q_HTD.shape[0], by_token=True)

    @staticmethod
    def backward(ctx: Any, g_THD: Tensor) -> tuple[Any, ...]:
        buckets: Buckets = ctx.buckets
        gradients: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        saved = ctx.saved_tensors  # once: under checkpointing it may be read only once
        gs = _gathered(g_THD.transpose(0, 1), buckets)
        for i, (g, padding) in enumerate(zip(gs, buckets.padding(g_THD.shape[1]), strict=True)):
            q, k, v, probs, out = saved[5 * i : 5 * i + 5]
            g.view(-1, g.shape[-1]).index_fill_(0, padding, 0.0)
            # Softmax backward, P ∘ (dP - rowsum(P ∘ dP)), where the row sum is g · out: D products instead of L.
            minus = torch.linalg.vecdot(g, out).neg_().unsqueeze(-1)
            ds = torch.baddbmm(minus, g, v.transpose(1, 2)).mul_(probs)
            dq, dk = _scaled_bmm(ds, k, ctx.scale), _scaled_bmm(ds.transpose(1, 2), q, ctx.scale)
            for into, gradient in zip(gradients, (dq, dk, torch.bmm(probs.transpose(1, 2), g)), strict=True):
                into.append(gradient.view(-1, g.shape[-1]))
        back = (
            _returned(parts, buckets, heads, by_token)
            for parts, heads, by_token in zip(gradients, ctx.heads, ctx.by_token, strict=True)
        )
        return (
            *(x.transpose(0, 1) if by_token else x for x, by_token in zip(back, ctx.by_token, strict=True)),
            None,
            None,
        )


def _scaled_bmm(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(x.new_empty(1), x, y, beta=0, alpha=scale)


def _lies_by_token(x_HTD: Tensor) -> bool:
    return not x_HTD.is_contiguous()


def _gathered(x_HTD: Tensor, buckets: Buckets) -> list[Tensor]:
    """(H, T, D) -> for each bucket (K · N, G · L, D)."""
    heads, _, size = x_HTD.shape
    by_token = _lies_by_token(x_HTD)
    flat = (x_HTD.transpose(0, 1) if by_token else x_HTD).reshape(-1, size)
    rows = buckets.gathers(heads, by_token)
    return [
        flat.index_select(0, index).view(buckets.kv_heads * n, -1, size)
        for index, (n, _) in zip(rows, buckets.shapes, strict=True)
    ]


def _returned(parts: list[Tensor], buckets: Buckets, heads: int, by_token: bool) -> Tensor:
    """The buckets' rows (K, N, G, L) back in the stream's order: (T, H, D) or (H, T, D); zero in long segments."""
    rows = torch.cat(parts).index_select(0, buckets.back(heads, by_token))
    out = rows.view(*((buckets.tokens, heads) if by_token else (heads, buckets.tokens)), -1)
    for segment in buckets.long:
        out.index_fill_(0 if by_token else 1, segment, 0.0)
    return out


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # segments are the mask
