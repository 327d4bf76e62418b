"""Adapters all together: a sum of all of them, tried and thrown away, and what it would keep of each.

Legend: K directions, O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from veneer.adapter.card import Adapter
from veneer.lowrank import concatenate
from veneer.measure.layers import directions
from veneer.model.progress import shown

SPANNED = 0.95  # of the squared norm of the sum: the directions that an adapter is held against


@dataclass(frozen=True)
class Together:
    """The sum of all adapters with weight 1 each.

    rank: the one asked for. kept: share of ‖ΣΔW‖² over all layers that the best approximation of that rank keeps.
    kept_by_layer: the same for each. alignment: of each adapter, in the order given, its subspace alignment ratio
    ‖U Uᵀ ΔW‖ / ‖ΔW‖ with the directions U that the sum writes most of itself to (Marczak et al. 2025, arXiv
    2502.04959), mean over its layers; None for an adapter that is zero.
    """

    rank: int
    kept: float
    kept_by_layer: dict[str, float]
    alignment: tuple[float | None, ...]


def together(adapters: Sequence[Adapter], rank: int, progress: bool = False) -> Together:
    """Of two or more adapters whose layers of one name are of one shape."""
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.modules()))
    energy, kept = {}, {}
    ratios: list[list[float]] = [[] for _ in adapters]
    for module in shown(modules, "sum of all", progress):
        held = {i: one.factors(module) for i, one in enumerate(adapters) if f"{module}.a" in one.tensors}
        total = directions(*concatenate(list(held.values())))
        energy_K = total.s.square()
        energy[module] = float(energy_K.sum())
        kept[module] = float(energy_K[:rank].sum())
        short_K = energy_K.cumsum(0) < SPANNED * energy[module]
        u_OK = total.u[:, : int(short_K.sum()) + 1]
        for i, (a_RI, b_OR) in held.items():
            own = directions(a_RI, b_OR)
            if len(own.s):
                ratios[i].append(_ratio(torch.linalg.norm(u_OK.mT @ (own.u * own.s)), torch.linalg.norm(own.s)))
    return Together(
        rank=rank,
        kept=_share(kept, energy),
        kept_by_layer={module: kept[module] / energy[module] if energy[module] else 1.0 for module in modules},
        alignment=tuple(math.fsum(found) / len(found) if found else None for found in ratios),
    )


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    return min(1.0, float(part / whole))


def _share(kept: Mapping[str, float], energy: Mapping[str, float]) -> float:
    whole = math.fsum(energy.values())
    return math.fsum(kept.values()) / whole if whole else 1.0
