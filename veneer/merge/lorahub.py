"""LoraHub (Huang et al. 2023, arXiv 2307.13269), in the space of updates: weights found by trying, without gradients.

One weight for each adapter, for the least mean loss over the parents' rows. The published method combines factors,
(Σ w B)(Σ w A), which has cross terms; here it is Σ w ΔW. Weights move by an evolution strategy of one parent and one
child (Rechenberg's rule as in Kern et al. 2004: the step grows by e^⅓ where the child is better, and else shrinks by
the fourth root of that, so that one success in five keeps it). It starts at the weights given, and what is not better
is not taken, so the result is never worse there, before it is cut to a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from veneer.config.merging import LorahubSettings
from veneer.merge.linear import linear
from veneer.merge.method import Merge, Stacks
from veneer.merge.on_base import OnBase
from veneer.merge.rows_loss import batches_of, mean_loss
from veneer.model.losses import STREAM
from veneer.model.progress import shown

STEP = 0.3  # of the first try, in each weight
GROW = math.exp(1 / 3)


def learn(stacks: Stacks, on_base: OnBase, options: LorahubSettings, progress: bool) -> tuple[Stacks, dict[str, Any]]:
    """The layers with the weights found."""
    slots = sorted(on_base.slots)
    given = {one.slot: one.weight for parents in stacks.values() for one in parents}
    batches = batches_of(on_base, STREAM)

    def loss(weights: Sequence[float]) -> float:
        scaled = [weight * options.scale for weight in weights]  # as the result will be; before any cut to a rank
        return mean_loss(on_base.loaded.model, batches, dict(zip(slots, scaled, strict=True)))

    start = [given.get(slot, 0.0) for slot in slots]
    found, before, after = searched(loss, start, options.evaluations, options.seed, progress)
    weight = dict(zip(slots, found, strict=True))
    layers = {module: [replace(p, weight=weight[p.slot]) for p in parents] for module, parents in stacks.items()}
    told = {"weights": [weight[slot] for slot in on_base.slots], "loss_before": before, "loss_after": after}
    return layers, told


def searched(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], evaluations: int, seed: int, progress: bool
) -> tuple[list[float], float, float]:
    """The best of so many weightings, the first of them the start; the loss at the start and there."""
    draw = torch.Generator().manual_seed(seed)
    best, step = list(start), STEP
    before = least = loss(best)
    for _ in shown(range(1, evaluations), "searching weights", progress):
        moves = torch.randn(len(best), generator=draw, dtype=torch.float64).tolist()
        tried = [weight + step * move for weight, move in zip(best, moves, strict=True)]
        found = loss(tried)
        better = found < least
        best, least = (tried, found) if better else (best, least)
        step *= GROW if better else GROW**-0.25
    return best, before, least


LORAHUB = Merge(linear, LorahubSettings, neutral={}, learn=learn)
