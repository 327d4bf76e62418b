"""Adapters all together: a sum of all of them, tried and thrown away, and what it would keep of each.

Legend: K directions, O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.lowrank import NEGLIGIBLE, concatenate
from veneer.measure.layers import Directions, directions

ALIGNMENT = "part of each update in the directions which the sum writes 95 % of itself to"
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


@dataclass(frozen=True)
class Summed:
    """The sum in one layer: its ‖.‖² and what of that the best approximation keeps; place of an adapter -> ratio."""

    energy: float = 0.0
    kept: float = 0.0
    ratios: Mapping[int, float] = field(default_factory=dict)


def summed(found: Mapping[int, Directions], factors: Sequence[tuple[Tensor, Tensor]], rank: int) -> Summed:
    """One layer. found, factors: of the adapters that have it, in one order, their updates, all of one shape."""
    energy_K, lead = _total(factors)
    whole = float(energy_K.sum())
    short_K = energy_K.cumsum(0) < SPANNED * whole
    return Summed(whole, float(energy_K[:rank].sum()), _aligned(lead(int(short_K.sum()) + 1), found))


def _aligned(u_OK: Tensor, found: Mapping[int, Directions]) -> dict[int, float]:
    """‖Uᵀ ΔW‖ / ‖ΔW‖ of each update that is not zero; all of them in one product."""
    those = {place: own for place, own in found.items() if len(own.s)}
    if not those:
        return {}
    counts = [len(own.s) for own in those.values()]
    written_OP = torch.cat([(own.u * own.s).to(u_OK.dtype) for own in those.values()], dim=1)
    inside_P = (u_OK.mT @ written_OP).square().sum(0, dtype=torch.float64)
    parts = zip(those.items(), inside_P.split(counts), strict=True)
    return {
        place: min(1.0, math.sqrt(float(inside_K.sum())) / float(torch.linalg.vector_norm(own.s)))
        for (place, own), inside_K in parts
    }


@dataclass
class Sum:
    """The sum of `count` adapters, gathered layer by layer."""

    count: int
    rank: int
    _layers: dict[str, Summed] = field(default_factory=dict)

    def add(self, module: str, layer: Summed) -> None:
        """One layer."""
        self._layers[module] = layer

    def together(self) -> Together:
        """Of all layers added."""
        whole = math.fsum(one.energy for one in self._layers.values())
        ratios = [[one.ratios[i] for one in self._layers.values() if i in one.ratios] for i in range(self.count)]
        return Together(
            rank=self.rank,
            kept=math.fsum(one.kept for one in self._layers.values()) / whole if whole else 1.0,
            kept_by_layer={
                module: one.kept / one.energy if one.energy else 1.0 for module, one in self._layers.items()
            },
            alignment=tuple(math.fsum(found) / len(found) if found else None for found in ratios),
        )


def _total(updates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Of the sum: the energies of its directions, largest first, and its first so many left singular vectors."""
    a_RI, b_OR = concatenate(updates)
    if len(a_RI) < min(len(b_OR), a_RI.shape[1]):
        found = directions(a_RI, b_OR)
        return found.s.square(), lambda count: found.u[:, :count]
    return _dense(b_OR @ a_RI)


def _dense(d_OI: Tensor) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Where factors are larger than the layer: by the eigenvectors of its smaller Gram matrix, in float64, whose
    eigenvalues are the energies. A product in float32 is as good as its factors."""
    wide = len(d_OI) <= d_OI.shape[1]
    d_OI = d_OI.double()
    energy_K, vectors_KK = torch.linalg.eigh(d_OI @ d_OI.mT if wide else d_OI.mT @ d_OI)
    energy_K, vectors_KK = energy_K.flip(0).clamp(min=0), vectors_KK.flip(1)

    def lead(count: int) -> Tensor:
        count = min(count, max(1, int((energy_K > NEGLIGIBLE**2 * energy_K[0]).sum())))
        first_KC = vectors_KK[:, :count]
        if wide:
            return first_KC.float()
        return (d_OI.float() @ first_KC.float()) / energy_K[:count].sqrt().clamp(min=1e-300).float()

    return energy_K, lead
