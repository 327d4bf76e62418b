"""One adapter by itself: how large each update is, and over how many directions it is spread.

Legend: n updates, R rank, K directions, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from veneer.adapter.card import Adapter
from veneer.adapter.experts import parameter_of
from veneer.lowrank import NEGLIGIBLE, svd_each

MOST, NEARLY_ALL = 0.9, 0.99  # of ‖ΔW‖²
_AT_ONCE = 64  # updates decomposed together


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
    return each_directions([(a_RI, b_OR)])[0]


def each_directions(factors: Sequence[tuple[Tensor, Tensor]]) -> list[Directions]:
    """`directions` of many updates (a_RI, b_OR) of one weight, in their order."""
    by_rank: dict[int, list[int]] = {}
    for place, (a_RI, _) in enumerate(factors):
        by_rank.setdefault(len(a_RI), []).append(place)
    found: dict[int, Directions] = {}
    for places in by_rank.values():
        for start in range(0, len(places), _AT_ONCE):
            here = places[start : start + _AT_ONCE]
            a_nRI, b_nOR = (torch.stack([factors[place][side] for place in here]) for side in (0, 1))
            found |= zip(here, map(_kept, *svd_each(a_nRI, b_nOR)), strict=True)
    return [found[place] for place in range(len(factors))]


def _kept(u_OK: Tensor, s_K: Tensor, v_IK: Tensor) -> Directions:
    count = int(((s_K > NEGLIGIBLE * s_K[:1]) & (s_K > 0)).sum())  # largest first
    return Directions(u_OK[:, :count], s_K[:count], v_IK[:, :count])


def update(rank: int, s_K: Tensor, wanted: int) -> Update:
    """Figures of an update with singular values s, largest first. rank: of its factors. wanted: the rank to cut to."""
    sizes = [size for size in s_K.tolist() if size > 0]  # plain numbers: tens of times faster than tensors of a few
    shares = list(accumulate(size * size for size in sizes))
    if not shares:
        return Update(rank, 0.0, 0.0, 1.0, 0, 0, 1.0)
    energy, total = shares[-1], math.fsum(sizes)
    shares = [share / energy for share in shares]
    entropy = -math.fsum(size / total * math.log(size / total) for size in sizes)
    return Update(
        rank=rank,
        norm=math.sqrt(energy),
        effective_rank=math.exp(entropy),
        first=shares[0],
        directions_90=_needed(shares, MOST),
        directions_99=_needed(shares, NEARLY_ALL),
        kept=shares[min(wanted, len(shares)) - 1],
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


def _needed(shares: Sequence[float], wanted: float) -> int:
    """How many of the directions hold the share; a share that rounding alone keeps below it counts."""
    return min(len(shares), 1 + sum(share < wanted - 1e-12 for share in shares))
