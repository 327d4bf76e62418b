"""The loss of a weighted sum of parents on their rows, without making it: all of them speak, each by its weight.

A layer's output is y + Σ w Δ, so this is the loss of Σ w ΔW itself, not of averaged factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.data.examples import Example
from veneer.errors import ModelError
from veneer.merge.on_base import OnBase
from veneer.model.losses import Targets, cross_entropy, streams_of, targets_of
from veneer.model.packed import running
from veneer.model.stream import EVEN, Stream, mixed, pack


class Batch(NamedTuple):
    """Packed rows and what is to be predicted in them."""

    stream: Stream
    targets: Targets


def batches_of(on_base: OnBase, max_tokens: int) -> dict[str, list[Batch]]:
    """Slot -> its rows, packed."""
    device = next(on_base.loaded.model.parameters()).device
    return {
        slot: [_batch(group, device) for group in streams_of(on_base.examples[slot], max_tokens)]
        for slot in sorted(on_base.examples)
    }


def _batch(group: Sequence[Example], device: torch.device) -> Batch:
    stream = pack([one.input_ids for one in group], device=device, share=True, multiple=EVEN)
    return Batch(stream, targets_of(stream, [one.targets for one in group]))


def spoken(batch: Batch, weights: Mapping[str, float]) -> Stream:
    """The stream with every slot over all of it by its weight; what weighs nothing is silent."""
    stream = mixed(batch.stream, {slot: weight for slot, weight in sorted(weights.items()) if weight})
    stream.plans.update(batch.stream.plans)
    return stream


def loss_of(model: nn.Module, batch: Batch, weights: Mapping[str, float]) -> tuple[Tensor, float]:
    """Sum of the nats and number of targets; call `backward` inside `running` only. For one use without gradients."""
    stream = spoken(batch, weights)
    with running(model, stream):
        sums_N, counts_N = cross_entropy(model, stream, batch.targets)
    return sums_N.sum(), float(counts_N.sum())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Mapping[str, Sequence[Batch]], weights: Mapping[str, float]) -> float:
    """Nats a token of each parent's rows, and the mean of that over the parents. Raises ModelError: not finite."""
    losses = []
    for slot in sorted(batches):
        found = [loss_of(model, batch, weights) for batch in batches[slot]]
        losses.append(sum(float(nats) for nats, _ in found) / sum(count for _, count in found))
    if not math.isfinite(fmean(losses)):
        half = next(model.parameters()).dtype == torch.float16
        advice = "--dtype bfloat16 or float32" if half else "smaller --weights or --scale"
        raise ModelError(f"the loss of the adapters on their rows is not finite. Next: {advice}")
    return fmean(losses)
