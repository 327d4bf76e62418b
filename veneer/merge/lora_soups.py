"""LoRA Soups' CAT (Prabhakar et al. 2024, arXiv 2410.13025): a weight for each adapter in each layer, learned.

Σ α_i ΔW_i with α by gradient descent (Adam) on the parents' rows, all else frozen: adapters times layers, so many
numbers. While it learns, B of each parent on the base is α B, so the gradient of α is that of B along B. The mean loss
over the parents' rows before and after says what was won; where that is nothing, the weights given stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.attach import methods_of
from veneer.config.merging import LoraSoupsSettings
from veneer.errors import ConfigError, ModelError, NotMergeable, listed
from veneer.merge.linear import linear
from veneer.merge.method import Merge, Stacks
from veneer.merge.on_base import OnBase
from veneer.merge.rows_loss import Batch, batches_of, mean_loss, spoken
from veneer.methods.lora import LoRA
from veneer.model.losses import cross_entropy
from veneer.model.packed import running
from veneer.model.progress import shown

TOKENS = 1024  # of each parent's rows in a step
Place = tuple[str, str]  # layer and slot


@dataclass(frozen=True)
class Scaled:
    """The parents on the base, where each B can be α times what it was."""

    methods: Mapping[Place, LoRA]
    b_OR: Mapping[Place, Tensor]

    @torch.no_grad()
    def scale(self, alpha_N: Tensor) -> None:
        """α in the order of the places."""
        for alpha, (place, method) in zip(alpha_N.tolist(), self.methods.items(), strict=True):
            method.b_OR.copy_(self.b_OR[place] * alpha)

    def gradient(self) -> Tensor:
        """Of the loss that went backward, by α."""
        pairs = ((method.b_OR.grad, self.b_OR[place]) for place, method in self.methods.items())
        return torch.stack([b.new_zeros(()) if g is None else (g * b).sum() for g, b in pairs]).cpu()


def learn(stacks: Stacks, on_base: OnBase, options: LoraSoupsSettings, progress: bool) -> tuple[Stacks, dict[str, Any]]:
    """The layers with the weights learned."""
    given = {(module, one.slot): one.weight for module, parents in stacks.items() for one in parents}
    start_N = torch.tensor(list(given.values()))
    batches, model = batches_of(on_base, TOKENS), on_base.loaded.model
    if model.dtype == torch.float16:
        raise ConfigError("lora_soups goes backward without a loss scale, which float16 needs; give --dtype bfloat16")
    if not options.scale:
        raise ConfigError("at `scale` 0 nothing is left to learn weights from; give another, or leave it out")
    scales = dict.fromkeys(on_base.slots, options.scale)  # as the result will be; before any cut to a rank
    with scaled(model, list(given)) as parents:
        parents.scale(start_N)
        before = mean_loss(model, batches, scales)
        found_N = _descended(model, parents, batches, start_N, options, progress)
        parents.scale(found_N)
        after = _loss_or_inf(model, batches, scales)
    won = after < before
    weight = dict(zip(given, found_N.tolist(), strict=True)) if won else given
    layers = {m: [replace(one, weight=weight[m, one.slot]) for one in stack] for m, stack in stacks.items()}
    means = [fmean(w for (_, slot), w in weight.items() if slot == wanted) for wanted in on_base.slots]
    each = {module: [weight.get((module, slot)) for slot in on_base.slots] for module in stacks}
    told = {"mean_weights": means, "loss_before": before, "loss_after": after if won else before}
    return layers, {**told, "weights": each}


def _loss_or_inf(model: nn.Module, batches: Mapping[str, Sequence[Batch]], scales: Mapping[str, float]) -> float:
    """Too large a learning rate leads anywhere; it has won nothing then."""
    try:
        return mean_loss(model, batches, scales)
    except ModelError:
        return float("inf")


def _descended(
    model: nn.Module,
    parents: Scaled,
    batches: Mapping[str, Sequence[Batch]],
    start_N: Tensor,
    options: LoraSoupsSettings,
    progress: bool,
) -> Tensor:
    alpha_N = start_N.clone().requires_grad_()
    optimiser = torch.optim.Adam([alpha_N], lr=options.learning_rate)
    slots = sorted(batches)
    for step in shown(range(options.max_steps), "learning weights", progress):
        parents.scale(alpha_N)
        for method in parents.methods.values():
            method.b_OR.grad = None
        for slot in slots:
            backward(model, batches[slot][step % len(batches[slot])], dict.fromkeys(slots, options.scale))
        alpha_N.grad = parents.gradient()
        optimiser.step()
    return alpha_N.detach()


def backward(model: nn.Module, batch: Batch, weights: Mapping[str, float]) -> None:
    """Adds the gradient of the rows' mean loss, one in so many of the sum."""
    stream = spoken(batch, weights)
    with running(model, stream):
        sums_N, counts_N = cross_entropy(model, stream, batch.targets)
        (sums_N.sum() / counts_N.sum() / len(weights)).backward()


@contextmanager
def scaled(model: nn.Module, places: Sequence[Place]) -> Iterator[Scaled]:
    """Inside, B alone takes gradients; afterwards all is as it was. Raises NotMergeable where there is no plain B."""
    by_slot = {slot: methods_of(model, slot) for slot in dict.fromkeys(slot for _, slot in places)}
    strange = [module for module, slot in places if type(by_slot[slot].get(module)) is not LoRA]
    if strange:
        advice = "Next: a method that learns no weights."
        raise NotMergeable(listed("These layers are no linear ones, their weights cannot be learned:", strange, advice))
    methods: dict[Place, Any] = {(module, slot): by_slot[slot][module] for module, slot in places}
    asked = {parameter: parameter.requires_grad for one in methods.values() for parameter in (one.a_RI, one.b_OR)}
    found = Scaled(methods, {place: one.b_OR.detach().clone() for place, one in methods.items()})
    try:
        for one in methods.values():
            one.a_RI.requires_grad_(False)
            one.b_OR.requires_grad_(True)
        yield found
    finally:
        found.scale(torch.ones(len(methods)))
        for parameter, before in asked.items():
            parameter.requires_grad_(before).grad = None


LORA_SOUPS = Merge(linear, LoraSoupsSettings, neutral={}, learn=learn)
