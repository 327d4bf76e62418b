"""Attention of a packed stream on CUDA in half precision: one varlen flash kernel over all segments, or cuDNN's where
they are of one length.

Legend: T tokens, H query heads, K key-value heads, D head size; S segments.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.model.scores import Scores
from veneer.model.stream import Stream, running_sums

CUDNN_SIZES = range(8, 129, 8)  # sizes of a head that cuDNN's kernel takes, forward and backward


def attend_varlen(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, stream: Stream, how: Scores) -> Tensor:
    """(H, T, D), (K, T, D), (K, T, D) -> (T, H, D); without caps and sinks."""
    plan = varlen_of(stream)
    window = how.within(plan.longest_keys).window
    if plan.equal and window is None and q_HTD.shape[-1] in CUDNN_SIZES and _cudnn_is_fastest(q_HTD.device.index):
        return _equal(q_HTD, k_KTD, v_KTD, plan.equal, how.scale)
    from torch.nn.attention.varlen import varlen_attn

    # Gathered in float32: what several segments send back to a shared row is summed there and rounded once.
    keys = (x if plan.keys is None else x.float().index_select(1, plan.keys).to(x.dtype) for x in (k_KTD, v_KTD))
    q, k, v = (x.transpose(0, 1) for x in (q_HTD, *keys))
    # Each segment's queries are the last of its keys: the kernel's causal mask is aligned at the end.
    settings: dict[str, Any] = {"scale": how.scale, "window_size": (-1 if window is None else window - 1, 0)}
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
