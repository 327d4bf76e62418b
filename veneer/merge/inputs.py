"""What layers read on each parent's rows, with that parent on: Gram matrices of a few directions, never of all inputs.

Legend: T tokens, I in, K directions.

Only what the parents' A read can matter to a merge that stays in their span, so a layer's inputs are seen in an
orthonormal basis of that, and what is kept of them is K x K. Rows are packed; every token of theirs counts the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import NotMergeable, listed
from veneer.lowrank.aware import reading_basis
from veneer.merge.method import Inputs, Parent, Stacks
from veneer.merge.on_base import OnBase
from veneer.model.leaf import Leaf
from veneer.model.losses import STREAM, streams_of
from veneer.model.packed import hidden_states, running
from veneer.model.progress import shown
from veneer.model.stream import pack

Grams = dict[str, Tensor]  # layer -> Gram matrix (K, K), float64


def with_inputs(stacks: Stacks, on_base: OnBase, progress: bool) -> dict[str, list[Parent]]:
    """Every parent with what its layer reads on its rows. Raises NotMergeable where that cannot be seen."""
    bases = {module: reading_basis(torch.cat([one.a for one in parents])) for module, parents in stacks.items()}
    grams = gather(on_base, bases, progress)
    return {
        module: [replace(one, inputs=Inputs(bases[module], grams[one.slot][module])) for one in parents]
        for module, parents in stacks.items()
    }


@torch.no_grad()
def gather(on_base: OnBase, bases_IK: Mapping[str, Tensor], progress: bool) -> dict[str, Grams]:
    """Slot -> for each layer the mean of q qᵀ over the tokens of the slot's rows, q = basisᵀ x."""
    model = on_base.loaded.model
    leaves = _leaves(model, list(bases_IK))
    found = {}
    for slot in shown(sorted(on_base.examples), "reading data", progress):
        sums = {path: torch.zeros(basis.shape[1], basis.shape[1]).double() for path, basis in bases_IK.items()}
        hooks = [leaves[path].register_forward_pre_hook(_adding(sums[path], bases_IK[path])) for path in bases_IK]
        try:
            tokens = _read(model, slot, on_base.examples[slot])
        finally:
            for hook in hooks:
                hook.remove()
        found[slot] = {path: gram / tokens for path, gram in sums.items()}
    return found


def _read(model: nn.Module, slot: str, examples: Sequence[Any]) -> int:
    """Runs the rows through the model's body; how many tokens they have."""
    device = next(model.parameters()).device
    for group in streams_of(examples, STREAM):
        stream = pack([example.input_ids for example in group], [slot] * len(group), device)
        with running(model, stream):
            hidden_states(model)
    return sum(len(example.input_ids) for example in examples)


def _adding(sum_KK: Tensor, basis_IK: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(leaf: nn.Module, fed: tuple[Tensor, ...]) -> None:
        x_TI = fed[0].reshape(-1, len(basis_IK))
        q_TK = (x_TI.float() @ basis_IK.to(x_TI.device, torch.float32)).cpu().double()
        sum_KK.add_(q_TK.mT @ q_TK)

    return add


def _leaves(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    leaves = {module.path: module for module in model.modules() if type(module) is Leaf}
    missing = [path for path in paths if path not in leaves]
    if missing:
        told = "What these layers read is not gathered; only that of linear layers below the vocabulary head is:"
        raise NotMergeable(listed(told, missing, "Next: a method that reads no data, without --activation-aware."))
    return leaves
