"""RegMean (Jin et al. 2023, arXiv 2212.09849), of the updates alone and in the span of what they read.

    W = argmin Σ |w_i| E‖(W - sign(w_i) ΔW_i) x_i‖² = (Σ w_i ΔW_i G_i) (Σ |w_i| G_i)⁻¹,    G_i = E[x_i x_iᵀ]

x_i is what the layer reads on the rows of parent i, with that parent on. W is sought among updates that read what the
parents read and nothing else, so that G_i is a small matrix and the rank that of all parents together. Weights are
relative: how much each parent's rows count; a negative one asks for the opposite of the parent there. Each G_i is taken
with `ridge` times its mean diagonal added to its diagonal, on both sides, so that directions which no row reads get the
weighted mean, and a parent alone comes back exactly. A parent that has nothing in a layer has no say there, whatever
its rows; the others are merged without it. Instead, the paper shrinks the rest of the matrix, in whatever basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.config.merging import RegmeanSettings
from veneer.merge.inputs import with_inputs
from veneer.merge.method import Inputs, Merge, Merged, Parent, Stacks
from veneer.merge.on_base import OnBase
from veneer.merge.spaces import core_of


def regmean(parents: Sequence[Parent], options: RegmeanSettings) -> Merged:
    """The least-squares update; its rank is that of all parents together."""
    core = core_of(parents, options.exact)
    right_IK = core.right.lift(torch.eye(len(core.right.coords_KR), dtype=torch.float64))
    grams = [_with_ridge(_seen_in(right_IK, parent.inputs), options.ridge) for parent in parents]
    wanted_KK = torch.stack([dw_KK @ g_KK for dw_KK, g_KK in zip(core.matrices, grams, strict=True)]).sum(0)
    whole_KK = torch.stack([abs(p.weight) * g_KK for p, g_KK in zip(parents, grams, strict=True)]).sum(0)
    merged_KK = torch.linalg.solve(whole_KK, wanted_KK, left=False)
    return Merged(right_IK.mT, core.left.lift(merged_KK))


def learn(stacks: Stacks, on_base: OnBase, options: RegmeanSettings, progress: bool) -> tuple[Stacks, dict[str, Any]]:
    """Reads the rows of each parent once."""
    tokens = {slot: sum(len(one.input_ids) for one in on_base.examples[slot]) for slot in on_base.slots}
    return with_inputs(stacks, on_base, progress), {"tokens_read": [tokens[slot] for slot in on_base.slots]}


def _seen_in(right_IK: Tensor, inputs: Inputs | None) -> Tensor:
    """The Gram matrix in the coordinates of another basis of the same directions, or of fewer."""
    assert inputs is not None, "regmean: a parent without inputs; combine() gathers them"
    turn_KK = inputs.basis_IK.double().mT @ right_IK
    return turn_KK.mT @ inputs.gram_KK @ turn_KK


def _with_ridge(g_KK: Tensor, ridge: float) -> Tensor:
    mean = float(g_KK.diagonal().mean())
    return g_KK + (ridge * mean if mean else 1.0) * torch.eye(len(g_KK), dtype=g_KK.dtype)


REGMEAN = Merge(regmean, RegmeanSettings, neutral={}, learn=learn)
