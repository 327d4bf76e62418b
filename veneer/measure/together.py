"""Adapters all together: a sum of all of them, tried and thrown away, and what it would keep of each.

Legend: K directions, O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.lowrank import NEGLIGIBLE, concatenate
from veneer.measure.layers import Directions, directions

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


@dataclass
class Sum:
    """The sum of `count` adapters, tried layer by layer."""

    count: int
    rank: int
    _energy: dict[str, float] = field(default_factory=dict)
    _kept: dict[str, float] = field(default_factory=dict)
    _ratios: dict[int, list[float]] = field(default_factory=dict)

    def add(self, module: str, found: Mapping[int, Directions], factors: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """One layer. found, factors: place of an adapter that has it -> its update; all of one shape."""
        total = _total(list(factors.values()))
        energy_K = total.s.square()
        self._energy[module] = float(energy_K.sum())
        self._kept[module] = float(energy_K[: self.rank].sum())
        short_K = energy_K.cumsum(0) < SPANNED * self._energy[module]
        u_OK = total.u[:, : int(short_K.sum()) + 1]
        for place, own in found.items():
            if len(own.s):
                ratio = torch.linalg.norm(u_OK.mT @ (own.u * own.s)) / torch.linalg.norm(own.s)
                self._ratios.setdefault(place, []).append(min(1.0, float(ratio)))

    def together(self) -> Together:
        """Of all layers added."""
        whole, ratios = math.fsum(self._energy.values()), [self._ratios.get(i) for i in range(self.count)]
        return Together(
            rank=self.rank,
            kept=math.fsum(self._kept.values()) / whole if whole else 1.0,
            kept_by_layer={m: self._kept[m] / energy if energy else 1.0 for m, energy in self._energy.items()},
            alignment=tuple(math.fsum(found) / len(found) if found else None for found in ratios),
        )


def _total(updates: Sequence[tuple[Tensor, Tensor]]) -> Directions:
    """Of the sum; by its factors unless those are larger than itself."""
    a_RI, b_OR = concatenate(updates)
    if len(a_RI) < min(len(b_OR), a_RI.shape[1]):
        return directions(a_RI, b_OR)
    u_OK, s_K, vt_KI = torch.linalg.svd(b_OR.double() @ a_RI.double(), full_matrices=False)
    kept = int((s_K > NEGLIGIBLE * s_K[0]).sum())
    return Directions(u_OK[:, :kept], s_K[:kept], vt_KI[:kept].mT)
