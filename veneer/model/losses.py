"""Losses on a packed stream, chunked over the vocabulary head; the table LOSSES.

Legend: T tokens, N sequences, M targets, D hidden size, V vocabulary.

Logits exist only for rows that have a target, and only a chunk of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.kernels.cross_entropy import cross_entropy_
from veneer.model.adapted_head import adapted_nll
from veneer.model.head import Head, head_of
from veneer.model.packed import hidden_states, running
from veneer.model.stream import EVEN, Stream, pack

CHUNK = 512  # rows of logits alive at once, at least
# On a GPU larger products are faster: rather no more than 8 chunks, but none above 2,048 rows (half a GiB of logits
# with 128,000 tokens), because activations of long streams may lie elsewhere.
CHUNKS, MOST = 8, 2048
STREAM = 4096  # tokens that are evaluated in one forward pass

# name -> "module:function"; (model, stream, targets, options by name) -> sum_N, count_N
LOSSES: dict[str, str] = {
    "cross_entropy": "veneer.model.losses:cross_entropy",
    "dpo": "veneer.model.dpo:dpo",
}
Loss = Callable[[nn.Module, Stream, "Targets"], tuple[Tensor, Tensor]]


class Targets(NamedTuple):
    """What is to be predicted where: row rows_M of the stream predicts token tokens_M for sequence sequences_M."""

    rows_M: Tensor
    tokens_M: Tensor
    sequences_M: Tensor


def targets_of(stream: Stream, trained: Sequence[Sequence[bool]]) -> Targets:
    """trained[n][i]: token i of sequence n is a target, predicted from the token before it (so i = 0 never is one)."""
    rows, places, sequences = [], [], []
    for sequence, (segment, flags) in enumerate(zip(stream.sequences, trained, strict=True)):
        at = stream.rows_of(segment)
        here = [i for i, flag in enumerate(flags) if flag and i > 0]
        rows += [at[i - 1] for i in here]
        places += [at[i] for i in here]
        sequences += [sequence] * len(here)
    columns = torch.tensor([rows, places, sequences], dtype=torch.int64, device=stream.token_ids_T.device)
    rows_M, places_M, sequences_M = columns
    return Targets(rows_M, stream.token_ids_T[places_M], sequences_M)


def cross_entropy(model: nn.Module, stream: Stream, targets: Targets) -> tuple[Tensor, Tensor]:
    """Sum of token cross-entropies and number of targets of each sequence, both (N) in float32.

    Call it inside `running(model, stream)`. One sequence's NaN stays its own, and of those it shares tokens with.
    """
    # In float32: a row that several sequences predict from gets the sum of their gradients, rounded once.
    hidden_MD = hidden_states(model).float().index_select(0, targets.rows_M)
    nll_M = head_nll(hidden_MD, head_of(model), targets.tokens_M, targets.rows_M)
    zeros = torch.zeros(len(stream.sequences), device=nll_M.device)
    sums_N = zeros.index_add(0, targets.sequences_M, nll_M)
    return sums_N, zeros.index_add(0, targets.sequences_M, torch.ones_like(nll_M))


def chunk_of(rows: int, on_gpu: bool) -> int:
    """How many rows of logits are made at a time."""
    return min(max(CHUNK, -(-rows // CHUNKS)), MOST) if on_gpu else CHUNK


def head_nll(hidden_MD: Tensor, head: Head, tokens_M: Tensor, rows_M: Tensor | None = None) -> Tensor:
    """-log softmax(head(hidden))[token], (M) in float32.

    rows_M: where in the running stream the hidden states stand, for a head with slots.
    """
    if head.speaks:
        chunk = max(1, chunk_of(len(hidden_MD), hidden_MD.is_cuda) // 4)  # some of its size are alive at once
        return adapted_nll(hidden_MD, head, tokens_M, rows_M, chunk)
    return _HeadNLL.apply(hidden_MD, head, tokens_M)


class _HeadNLL(torch.autograd.Function):
    """The gradient for `hidden` is made while the logits of its chunk exist; backward only scales its rows."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head: Head, tokens_M: Tensor) -> Tensor:
        wanted, weight_VD = ctx.needs_input_grad[0], head.linear.weight
        nll_M = torch.empty(len(hidden_MD), dtype=torch.float32, device=hidden_MD.device)
        grad_MD = torch.empty_like(hidden_MD) if wanted else None
        chunk = chunk_of(len(hidden_MD), hidden_MD.is_cuda)
        for start in range(0, len(hidden_MD), chunk):
            rows = slice(start, start + chunk)
            logits_MV = nn.functional.linear(hidden_MD[rows].to(weight_VD.dtype), weight_VD, head.linear.bias)
            logits_MV, slope_MV = head.shaped(logits_MV)
            nll_M[rows] = cross_entropy_(logits_MV, tokens_M[rows], wanted)
            if grad_MD is not None:
                g_MV = logits_MV if slope_MV is None else logits_MV.mul_(slope_MV)
                grad_MD[rows] = (g_MV @ weight_VD).to(grad_MD.dtype)
        if grad_MD is not None and head.scale != 1.0:
            grad_MD *= head.scale
        ctx.save_for_backward(grad_MD)
        return nll_M

    @staticmethod
    def backward(ctx: Any, g_M: Tensor) -> tuple[Any, ...]:
        (grad_MD,) = ctx.saved_tensors
        return (grad_MD * g_M[:, None].to(grad_MD.dtype)), None, None


@torch.no_grad()
def sequence_nll(
    model: nn.Module, examples: Sequence, slot: str | None, max_tokens: int = STREAM
) -> list[tuple[float, int]]:
    """Sum of token cross-entropies and number of targets of every example, spoken by `slot` (None: the base).

    examples: objects with `input_ids` and `targets`; packed into streams of at most max_tokens (or one example).
    """
    device = next(model.parameters()).device
    results: list[tuple[float, int]] = []
    for group in streams_of(examples, max_tokens):
        stream = pack([example.input_ids for example in group], [slot] * len(group), device, share=True, multiple=EVEN)
        with running(model, stream):
            sums_N, counts_N = cross_entropy(model, stream, targets_of(stream, [example.targets for example in group]))
        results += [(nll, int(count)) for nll, count in zip(sums_N.tolist(), counts_N.tolist(), strict=True)]
    return results


def streams_of(examples: Sequence, max_tokens: int) -> list[list]:
    """Neighbours together while they fit into max_tokens; a longer example stands alone."""
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
