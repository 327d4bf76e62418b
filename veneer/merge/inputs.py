"""What layers read on each parent's rows, with that parent on: Gram matrices of a few directions, never of all inputs.

Legend: T tokens, I in, K directions.

Only what the parents' A read can matter to a merge that stays in their span, so a layer's inputs are seen in an
orthonormal basis of that, and what is kept of them is K x K. Rows are packed; every token of theirs counts the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from veneer.errors import NotMergeable, listed
from veneer.lowrank.aware import reading_basis
from veneer.merge.method import Inputs, Parent, Stacks
from veneer.merge.on_base import OnBase
from veneer.model.heard import Listener, hear, linear_layers
from veneer.model.progress import shown

Grams = dict[str, Tensor]  # layer -> Gram matrix (K, K), float64


def with_inputs(stacks: Stacks, on_base: OnBase, progress: bool) -> dict[str, list[Parent]]:
    """Every parent with what its layer reads on its rows. Raises NotMergeable where that cannot be seen."""
    bases = {module: reading_basis(torch.cat([one.a for one in parents])) for module, parents in stacks.items()}
    grams = gather(on_base, bases, progress)
    return {
        module: [replace(one, inputs=Inputs(bases[module], grams[one.slot][module])) for one in parents]
        for module, parents in stacks.items()
    }


def gather(on_base: OnBase, bases_IK: Mapping[str, Tensor], progress: bool) -> dict[str, Grams]:
    """Slot -> for each layer the mean of q qᵀ over the tokens of the slot's rows, q = basisᵀ x.

    Raises NotMergeable with the layers that cannot be listened to.
    """
    model = on_base.loaded.model
    _check_linear(model, list(bases_IK))
    found = {}
    for slot in shown(sorted(on_base.examples), "reading data", progress):
        sums = {path: torch.zeros(basis.shape[1], basis.shape[1]).double() for path, basis in bases_IK.items()}
        listeners = {path: _adding(sums[path], bases_IK[path]) for path in bases_IK}
        tokens = hear(model, listeners, slot, on_base.examples[slot])
        found[slot] = {path: gram / tokens for path, gram in sums.items()}
    return found


def _adding(sum_KK: Tensor, basis_IK: Tensor) -> Listener:
    def add(x_TI: Tensor) -> None:
        q_TK = (x_TI.float() @ basis_IK.to(x_TI.device, torch.float32)).cpu().double()
        sum_KK.add_(q_TK.mT @ q_TK)

    return add


def _check_linear(model: nn.Module, paths: Sequence[str]) -> None:
    known = linear_layers(model)
    missing = [path for path in paths if path not in known]
    if missing:
        told = "What these layers read is not gathered; only that of linear layers below the vocabulary head is:"
        raise NotMergeable(listed(told, missing, "Next: a method that reads no data, without --activation-aware."))
