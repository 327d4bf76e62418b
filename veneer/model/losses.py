"""Losses on a packed stream, chunked over the vocabulary head; the table LOSSES.

Legend: T tokens, N targets, D hidden size, V vocabulary, S segments.

Logits exist only for rows that have a target, and only a chunk of them at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.model.packed import hidden_states, running
from veneer.model.stream import Stream, pack

CHUNK = 512  # rows of logits alive at once

# name -> "module:function"; (model, stream, targets) -> sum_S, count_S
LOSSES: dict[str, str] = {
    "cross_entropy": "veneer.model.losses:cross_entropy",
}


@dataclasses.dataclass(frozen=True)
class Targets:
    """What is to be predicted where: row rows_N of the stream predicts token tokens_N; segment_N says whose it is."""

    rows_N: Tensor
    tokens_N: Tensor
    segments_N: Tensor


def targets_of(stream: Stream, trained: Sequence[Sequence[bool]]) -> Targets:
    """trained[s][i]: token i of segment s is a target, predicted from the token before it (so i = 0 never is one)."""
    rows, segments = [], []
    for segment, (start, flags) in enumerate(zip(stream.starts, trained, strict=False)):
        here = [start + i - 1 for i, flag in enumerate(flags) if flag and i > 0]
        rows += here
        segments += [segment] * len(here)
    device = stream.token_ids_T.device
    rows_N = torch.tensor(rows, dtype=torch.int64, device=device)
    return Targets(rows_N, stream.token_ids_T[rows_N + 1], torch.tensor(segments, dtype=torch.int64, device=device))


def cross_entropy(model: nn.Module, stream: Stream, targets: Targets) -> tuple[Tensor, Tensor]:
    """Sum of token cross-entropies and number of targets of each segment, both (S) in float32.

    Call it inside `running(model, stream)`. One segment's NaN stays its own.
    """
    hidden_ND = hidden_states(model).index_select(0, targets.rows_N)
    nll_N = head_nll(hidden_ND, model.get_output_embeddings(), targets.tokens_N)
    zeros = torch.zeros(len(stream.lengths), device=nll_N.device)
    sums_S = zeros.index_add(0, targets.segments_N, nll_N)
    return sums_S, zeros.index_add(0, targets.segments_N, torch.ones_like(nll_N))


def head_nll(hidden_ND: Tensor, head: nn.Linear, tokens_N: Tensor) -> Tensor:
    """-log softmax(hidden · head')[token], (N) in float32, through a frozen head."""
    return _HeadNLL.apply(hidden_ND, head.weight, head.bias, tokens_N)


class _HeadNLL(torch.autograd.Function):
    """The gradient for `hidden` is made while the logits of its chunk exist; backward only scales its rows."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, tokens_N: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        nll_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if wanted else None
        for start in range(0, len(hidden_ND), CHUNK):
            rows = slice(start, start + CHUNK)
            log_probs = _logits(hidden_ND[rows], weight_VD, bias_V).log_softmax(-1)
            nll_N[rows] = -log_probs.gather(1, tokens_N[rows, None]).squeeze(1)
            if grad_ND is not None:
                probs = log_probs.exp_()
                probs.scatter_add_(1, tokens_N[rows, None], torch.full_like(probs[:, :1], -1.0))
                grad_ND[rows] = probs.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(grad_ND)
        return nll_N

    @staticmethod
    def backward(ctx: Any, g_N: Tensor) -> tuple[Any, ...]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * g_N[:, None].to(grad_ND.dtype)), None, None, None


def _logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    return nn.functional.linear(hidden_ND.to(weight_VD.dtype), weight_VD, bias_V).float()


@torch.no_grad()
def sequence_nll(
    model: nn.Module, examples: Sequence, slot: str | None, max_tokens: int = 4096
) -> list[tuple[float, int]]:
    """Sum of token cross-entropies and number of targets of every example, spoken by `slot` (None: the base).

    examples: objects with `input_ids` and `targets`; packed into streams of at most max_tokens (or one example).
    """
    device = next(model.parameters()).device
    results: list[tuple[float, int]] = []
    for group in _groups(examples, max_tokens):
        stream = pack([example.input_ids for example in group], [slot] * len(group), device)
        with running(model, stream):
            sums_S, counts_S = cross_entropy(model, stream, targets_of(stream, [example.targets for example in group]))
        results += [(nll, int(count)) for nll, count in zip(sums_S.tolist(), counts_S.tolist(), strict=True)]
    return results


def _groups(examples: Sequence, max_tokens: int) -> list[list]:
    """Neighbours together while they fit."""
    groups: list[list] = []
    total = 0
    for example in examples:
        if groups and total + len(example.input_ids) <= max_tokens:
            groups[-1].append(example)
            total += len(example.input_ids)
        else:
            groups.append([example])
            total = len(example.input_ids)
    return groups
