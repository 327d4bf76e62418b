"""What adapters do to each other's data: how much one writes on the inputs that another one learned from.

Legend: T tokens, n adapters with this layer, I in, O out, P ranks of all of them side by side.

The logic of OSRM (Zhang & Zhou 2025, arXiv 2505.22934): two updates interfere as far as one of them answers the
other's inputs, however their weights lie to each other. Of x, the inputs of a layer while A speaks over A's data, two
products tell all: the thin z = A x of every adapter, whose Gram matrix is summed over tokens, and BᵀB. Then
Σ <ΔW_i x, ΔW_j x> = <(BᵀB)_ij, (Σ z zᵀ)_ij>, and no ΔW is formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.card import Adapter
from veneer.model.heard import hear, linear_layers
from veneer.model.losses import STREAM

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Functional:
    """What adapter B writes on the inputs x of A's data while A speaks, beside what A writes there.

    layers: those that both have and in which A writes something; without any, all else is None. ratio: Σ‖ΔW_B x‖² /
    Σ‖ΔW_A x‖² over all tokens, mean over layers: 0 for an update that does not answer these inputs, 1 for A itself.
    cosine: Σ<ΔW_A x, ΔW_B x> / √(Σ‖ΔW_A x‖² Σ‖ΔW_B x‖²), in [-1, 1], mean over layers, 0 where B writes nothing.
    ratios, cosines: the same by layer.
    """

    layers: int
    ratio: float | None
    cosine: float | None
    ratios: dict[str, float]
    cosines: dict[str, float]


def functional(
    model: nn.Module,
    adapters: Sequence[Adapter],
    own: int,
    slot: str,
    examples: Sequence[Any],
    max_tokens: int = STREAM,
) -> dict[int, Functional]:
    """Place of every other adapter -> what it writes on the data of adapters[own], which is attached as `slot`.

    examples: objects with `input_ids`, all of whose tokens count, the question as well as the answer. Measured is B·A,
    in linear layers: embeddings, heads and stacked experts have no such inputs.
    """
    products = inner_products(model, adapters, slot, examples, max_tokens)
    return {other: _functional(products, own, other) for other in range(len(adapters)) if other != own}


def inner_products(
    model: nn.Module, adapters: Sequence[Adapter], slot: str, examples: Sequence[Any], max_tokens: int = STREAM
) -> dict[str, dict[tuple[int, int], float]]:
    """Path of a linear layer -> (i, j) -> Σ over tokens of <ΔW_i x, ΔW_j x>, of the adapters that have it.

    x: what the layer is fed while `slot` speaks.
    """
    device = next(model.parameters()).device
    layers = ((path, _factors(adapters, path)) for path in linear_layers(model))
    meters = {path: _Meter(factors, device) for path, factors in layers if factors}
    hear(model, meters, slot, examples, max_tokens)
    return {path: meter.products() for path, meter in meters.items() if meter.heard}


def _factors(adapters: Sequence[Adapter], path: str) -> dict[int, Factors]:
    return {i: one.factors(path) for i, one in enumerate(adapters) if f"{path}.a" in one.tensors}


class _Meter:
    """What the adapters of one layer make of its inputs, summed: the Gram matrix of z, float64."""

    def __init__(self, factors: Mapping[int, Factors], device: torch.device) -> None:
        self.factors, self.heard = factors, False
        self.a_PI = torch.cat([a_RI for a_RI, _ in factors.values()]).to(device, torch.float32)
        self.gram_PP = torch.zeros(len(self.a_PI), len(self.a_PI), dtype=torch.float64, device=device)

    def __call__(self, x_TI: Tensor) -> None:
        z_TP = (x_TI.float() @ self.a_PI.mT).double()
        self.gram_PP += z_TP.mT @ z_TP
        self.heard = True

    def products(self) -> dict[tuple[int, int], float]:
        b_OP = torch.cat([b_OR for _, b_OR in self.factors.values()], dim=1).double()
        both_PP = (b_OP.mT @ b_OP) * self.gram_PP.cpu()
        sizes = [len(a_RI) for a_RI, _ in self.factors.values()]
        blocks = [row.split(sizes, dim=1) for row in both_PP.split(sizes)]
        places = list(enumerate(self.factors))
        return {(one, other): float(blocks[i][j].sum()) for i, one in places for j, other in places}


def _functional(products: Mapping[str, Mapping[tuple[int, int], float]], own: int, other: int) -> Functional:
    ratios, cosines = {}, {}
    for path, found in products.items():
        mine, theirs = found.get((own, own), 0.0), found.get((other, other))
        if mine > 0 and theirs is not None:
            ratios[path] = max(0.0, theirs) / mine
            cosines[path] = _cosine(found[own, other], mine, max(0.0, theirs))
    return Functional(len(ratios), _mean(ratios), _mean(cosines), ratios, cosines)


def _cosine(inner: float, one: float, other: float) -> float:
    sizes = math.sqrt(one) * math.sqrt(other)
    return max(-1.0, min(1.0, inner / sizes)) if sizes else 0.0


def _mean(values: Mapping[str, float]) -> float | None:
    return math.fsum(values.values()) / len(values) if values else None
