"""What a model gives the tokens of a text: how likely they are, and how many are the ones it would have chosen.

Legend: T tokens, N sequences, M targets, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.kernels.cross_entropy import cross_entropy_
from veneer.model.head import Head, head_of
from veneer.model.losses import STREAM, chunk_of, streams_of, targets_of
from veneer.model.packed import hidden_states, running
from veneer.model.stream import EVEN, Stream, mixed, pack


class Likelihood(NamedTuple):
    """Of the targets of one sequence: Σ -log p in nats, how many there are, and how many are the likeliest token."""

    nll: float
    tokens: int
    hits: int


@torch.no_grad()
def sequence_likelihoods(
    model: nn.Module, examples: Sequence, slot: str | Mapping[str, float] | None, max_tokens: int = STREAM
) -> list[Likelihood]:
    """The likelihood of every example, spoken by `slot` (None: the base), or by several at a time, slot -> weight.

    examples: objects with `input_ids` and `targets`; packed into streams of at most max_tokens (or one example).
    Neighbours that begin alike, such as the choices of one question, share that beginning.
    """
    device = next(model.parameters()).device
    results: list[Likelihood] = []
    for group in streams_of(examples, max_tokens):
        stream = _packed(group, slot, device)
        targets = targets_of(stream, [example.targets for example in group])
        with running(model, stream):
            hidden_MD = hidden_states(model).float().index_select(0, targets.rows_M)
            nll_M, hit_M = _head(hidden_MD, head_of(model), targets.tokens_M, targets.rows_M)
        columns = (nll_M, torch.ones_like(nll_M), hit_M)
        sums = (torch.zeros(len(group), device=device).index_add(0, targets.sequences_M, column) for column in columns)
        results += [
            Likelihood(nll, int(tokens), int(hits)) for nll, tokens, hits in zip(*map(_list, sums), strict=True)
        ]
    return results


def _packed(group: Sequence, slot: str | Mapping[str, float] | None, device: torch.device) -> Stream:
    one = None if isinstance(slot, Mapping) else slot
    stream = pack([example.input_ids for example in group], [one] * len(group), device, share=True, multiple=EVEN)
    return mixed(stream, slot) if isinstance(slot, Mapping) else stream


def _head(hidden_MD: Tensor, head: Head, tokens_M: Tensor, rows_M: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(head(hidden))[token], and 1 where no token is likelier; both (M) in float32, a chunk at a time."""
    nll_M = torch.empty(len(hidden_MD), dtype=torch.float32, device=hidden_MD.device)
    hit_M = torch.empty_like(nll_M)
    chunk = chunk_of(len(hidden_MD), hidden_MD.is_cuda)
    for start in range(0, len(hidden_MD), chunk):
        rows = slice(start, start + chunk)
        logits_MV = head.logits(hidden_MD[rows], rows_M[rows])
        hit_M[rows] = (logits_MV.argmax(-1) == tokens_M[rows]).float()  # first: what follows overwrites the logits
        nll_M[rows] = cross_entropy_(logits_MV, tokens_M[rows], False)
    return nll_M, hit_M


def _list(values: Tensor) -> list[float]:
    return values.tolist()
