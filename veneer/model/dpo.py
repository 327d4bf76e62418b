"""DPO (Rafailov et al. 2023, arXiv 2305.18290): the likelier the chosen answer against the rejected one, the better.

Legend: N sequences, in pairs: a chosen answer, then the rejected one to the same prompt. P pairs.

What both gain is measured against the base, which is the same stream with nobody speaking: no second model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.model.losses import Targets, cross_entropy, sequence_nll
from veneer.model.packed import silenced
from veneer.model.stream import Stream


def dpo(model: nn.Module, stream: Stream, targets: Targets, beta: float) -> tuple[Tensor, Tensor]:
    """-log σ(β · margin) of every pair, where its chosen sequence stands, and 1; 0 and 0 for rejected ones: both (N).

    Call it inside `running(model, stream)`. A sequence without a partner, at the end, counts nothing.
    """
    with torch.no_grad(), silenced(model):
        reference_N, _ = cross_entropy(model, stream, targets)
    nll_N, _ = cross_entropy(model, stream, targets)
    losses_P = -F.logsigmoid(beta * margins(nll_N, reference_N))
    return _spread(losses_P, nll_N), _spread(torch.ones_like(losses_P), nll_N)


def margins(nll_N: Tensor, reference_N: Tensor) -> Tensor:
    """How much more the chosen answer has gained on the base than the rejected one, in nats (P).

    nll_N, reference_N: -log p of each answer, spoken by the adapter and by the base.
    """
    gains_N = reference_N - nll_N
    pairs = len(gains_N) // 2
    chosen_P, rejected_P = gains_N[: 2 * pairs].view(pairs, 2).unbind(1)
    return chosen_P - rejected_P


def pair_losses(
    model: nn.Module, examples: Sequence[Any], slot: str, beta: float, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Of examples in pairs: the loss of each pair, and its margin in nats; both (P) in float64, without gradients."""
    nll_N, reference_N = (
        torch.tensor([nll for nll, _ in sequence_nll(model, examples, who, max_tokens)], dtype=torch.float64)
        for who in (slot, None)
    )
    margins_P = margins(nll_N, reference_N)
    return -F.logsigmoid(beta * margins_P), margins_P


def _spread(values_P: Tensor, like_N: Tensor) -> Tensor:
    """(N): a pair's value where its chosen sequence stands, else 0."""
    pairs = torch.stack([values_P, torch.zeros_like(values_P)], 1).flatten()
    return F.pad(pairs, (0, len(like_N) - len(pairs)))
