"""The cut to a rank by what it changes on the parents' rows, instead of by the weights alone (`activation_aware`).

What is cut is the merge at its full rank. What its layers read is gathered once more, in the directions that the merge
reads, which need not be those of the parents (ties, knots); the rows of each parent, with that parent on, count the
same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from veneer.lowrank.aware import AwareCut, reading_basis, truncate_aware
from veneer.merge.inputs import gather
from veneer.merge.layer import Layer
from veneer.merge.on_base import OnBase
from veneer.merge.recipe import Recipe

WHOLE = {"rank": None, "energy": 1.0, "activation_aware": False}


def uncut(recipe: Recipe) -> Recipe:
    """The recipe whose result `cut_by_activations` brings to the rank."""
    return replace(recipe, options={**recipe.options, **WHOLE})


def cut_by_activations(
    layers: Mapping[str, Layer], on_base: OnBase, rank: int, progress: bool
) -> tuple[dict[str, Layer], dict[str, Any]]:
    """The layers at the rank, and what the cut has kept of their outputs: mean over the layers, and what a cut by
    weights alone would have kept."""
    live = {module: layer for module, layer in layers.items() if layer.norm}
    grams = gather(on_base, {module: reading_basis(layer.a) for module, layer in live.items()}, progress)
    slots = sorted(grams)
    cuts = {
        module: truncate_aware(layer.a, layer.b, torch.stack([grams[s][module] for s in slots]).mean(0), rank)
        for module, layer in live.items()
    }
    cut = {module: _cut(layer, cuts[module]) if module in cuts else layer for module, layer in layers.items()}
    count = max(1, len(cuts))
    kept = sum(one.output_kept for one in cuts.values()) / count
    plain = sum(one.output_kept_plain for one in cuts.values()) / count
    return cut, {"output_kept": kept, "output_kept_by_weights_alone": plain}


def _cut(layer: Layer, cut: AwareCut) -> Layer:
    norm = float(torch.linalg.vector_norm(cut.s))
    left = max(0.0, norm**2 - cut.error**2) ** 0.5
    error = math.hypot(cut.error, layer.error)  # what the method itself has left out is lost as well
    kept = left**2 / (left**2 + error**2) if left else 0.0
    degenerate = layer.degenerate or cut.tied
    return Layer(cut.a.float(), cut.b.float(), norm=left, kept=kept, error=error, degenerate=degenerate)
