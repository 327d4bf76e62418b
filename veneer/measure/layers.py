"""One adapter by itself: how large each update is, and over how many directions it is spread.

Legend: R rank, K directions, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapter.card import Adapter
from veneer.adapter.experts import parameter_of
from veneer.lowrank import NEGLIGIBLE, svd

MOST, NEARLY_ALL = 0.9, 0.99  # of ‖ΔW‖²


@dataclass(frozen=True)
class Directions:
    """An update as U diag(s) Vᵀ, without directions that are rounding; u (O, K), s (K), v (I, K), float64."""

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True)
class Update:
    """Figures of one layer's update.

    rank: of its factors. norm: Frobenius. effective_rank: exp of the entropy of s / Σs (Roy and Vetterli, 2007).
    first: share of ‖ΔW‖² in the strongest direction; directions_90, directions_99: how many directions hold that share.
    kept: share that the best approximation of the rank asked for keeps. Shares of a zero update: 1 in 0 directions.
    """

    rank: int
    norm: float
    effective_rank: float
    first: float
    directions_90: int
    directions_99: int
    kept: float


@dataclass(frozen=True)
class Summary:
    """Figures of several layers: ranks from and to, the norm of all together, medians, and the share kept of all."""

    layers: int
    parameters: int
    rank_from: int
    rank_to: int
    norm: float
    effective_rank: float
    first: float
    directions_90: float
    directions_99: float
    kept: float


def directions(a_RI: Tensor, b_OR: Tensor) -> Directions:
    """Of B·A. Exact up to rounding, whatever the factors."""
    u_OK, s_K, v_IK = svd(a_RI, b_OR)
    kept_K = (s_K > NEGLIGIBLE * s_K[:1]) & (s_K > 0)
    return Directions(u_OK[:, kept_K], s_K[kept_K], v_IK[:, kept_K])


def update(rank: int, s_K: Tensor, wanted: int) -> Update:
    """Figures of an update with singular values s, largest first. rank: of its factors. wanted: the rank to cut to."""
    energy_K = s_K.double().square()
    total = float(energy_K.sum())
    if total == 0:
        return Update(rank, 0.0, 0.0, 1.0, 0, 0, 1.0)
    share_K = energy_K.cumsum(0) / total
    entropy = float(torch.special.entr(s_K / s_K.sum()).sum())
    return Update(
        rank=rank,
        norm=math.sqrt(total),
        effective_rank=math.exp(entropy),
        first=float(share_K[0]),
        directions_90=_needed(share_K, MOST),
        directions_99=_needed(share_K, NEARLY_ALL),
        kept=min(1.0, float(share_K[min(wanted, len(share_K)) - 1])),
    )


def summary(adapter: Adapter, found: Mapping[str, Update], modules: Sequence[str]) -> Summary:
    """Of the modules named, one at least."""
    those = [found[module] for module in modules]
    energy = math.fsum(one.norm**2 for one in those)
    kept = math.fsum(one.kept * one.norm**2 for one in those)
    return Summary(
        layers=len(those),
        parameters=sum(tensor.numel() for module in modules for tensor in adapter.of(module).values()),
        rank_from=min(one.rank for one in those),
        rank_to=max(one.rank for one in those),
        norm=math.sqrt(energy),
        effective_rank=median([one.effective_rank for one in those]),
        first=median([one.first for one in those]),
        directions_90=median([one.directions_90 for one in those]),
        directions_99=median([one.directions_99 for one in those]),
        kept=kept / energy if energy else 1.0,
    )


def by_kind(modules: Iterable[str]) -> dict[str, list[str]]:
    """Kind of layer (`q_proj`, `gate_up_proj` of experts, ...) -> the modules of that kind, in their order."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault((parameter_of(module) or module).rpartition(".")[2], []).append(module)
    return found


def median(values: Sequence[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return float(ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2)


def _needed(share_K: Tensor, wanted: float) -> int:
    """How many of the directions hold the share; a share that rounding alone keeps below it counts."""
    return min(len(share_K), 1 + int((share_K < wanted - 1e-12).sum()))
