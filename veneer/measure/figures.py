"""Adapters measured layer by layer, each alone and all beside each other, with one decomposition of every update."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from veneer.adapter.card import Adapter
from veneer.lowrank.workers import workers
from veneer.measure.layers import Update, each_directions, update
from veneer.measure.pairs import Pair, Pairs, Sums, layer_sums
from veneer.measure.together import Sum, Summed, Together, summed
from veneer.model.progress import shown

_LAYERS = 8  # at a time: each holds all updates of one layer in float64


@dataclass(frozen=True)
class Figures:
    """updates: of each adapter, in the order given: module path -> figures. pairs, together: of several adapters."""

    updates: list[dict[str, Update]]
    pairs: list[Pair]
    together: Together | None


def measure(adapters: Sequence[Adapter], rank: int, progress: bool = False) -> Figures:
    """Of adapters whose layers of one name are of one shape. rank: to which energies are cut.

    No more than eight layers are held decomposed at a time.
    """
    with workers(_LAYERS) as pool:
        return _measure(adapters, rank, pool, progress)


def _measure(adapters: Sequence[Adapter], rank: int, pool: Executor, progress: bool) -> Figures:
    several = len(adapters) > 1
    updates: list[dict[str, Update]] = [{} for _ in adapters]
    pairs, total = Pairs(len(adapters)), Sum(len(adapters), rank)
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.modules()))
    layers = pool.map(lambda module: _layer(adapters, module, rank), modules)
    for module, layer in zip(shown(modules, "layers", progress), layers, strict=True):
        for i, one in layer.updates.items():
            updates[i][module] = one
        if several:
            pairs.add({i: one.norm**2 for i, one in layer.updates.items()}, layer.sums)
            total.add(module, layer.summed)
    return Figures(updates, pairs.pairs() if several else [], total.together() if several else None)


@dataclass(frozen=True)
class _Layer:
    """One layer measured: of each adapter that has it, by place; of several adapters also pairs and the sum."""

    updates: dict[int, Update]
    sums: Sums
    summed: Summed


def _layer(adapters: Sequence[Adapter], module: str, rank: int) -> _Layer:
    factors = {i: one.factors(module) for i, one in enumerate(adapters) if f"{module}.a" in one.tensors}
    found = dict(zip(factors, each_directions(list(factors.values())), strict=True))
    updates = {i: update(len(factors[i][0]), one.s, rank) for i, one in found.items()}
    sums = layer_sums(list(found.values()), list(factors.values())) if len(found) > 1 else {}
    return _Layer(updates, sums, summed(found, list(factors.values()), rank) if len(adapters) > 1 else Summed())
