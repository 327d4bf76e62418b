"""Adapters measured layer by layer, each alone and all beside each other, with one decomposition of every update.

With a thread of arithmetic each, as in merging (`veneer.merge.apply`): torch's own threads gain little at these shapes,
and where another process holds a core they cost tens of times the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from veneer.adapter.card import Adapter
from veneer.measure.layers import Update, directions, update
from veneer.measure.pairs import Pair, Pairs
from veneer.measure.together import Sum, Together
from veneer.model.progress import shown


@dataclass(frozen=True)
class Figures:
    """updates: of each adapter, in the order given: module path -> figures. pairs, together: of several adapters."""

    updates: list[dict[str, Update]]
    pairs: list[Pair]
    together: Together | None


def measure(adapters: Sequence[Adapter], rank: int, progress: bool = False) -> Figures:
    """Of adapters whose layers of one name are of one shape. rank: to which energies are cut.

    No two layers are held decomposed at a time.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            torch.set_num_threads(1)
            return _measure(adapters, rank, pool, progress)
    finally:
        torch.set_num_threads(threads)


def _measure(adapters: Sequence[Adapter], rank: int, pool: ThreadPoolExecutor, progress: bool) -> Figures:
    updates: list[dict[str, Update]] = [{} for _ in adapters]
    pairs, total = Pairs(len(adapters)), Sum(len(adapters), rank)
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.modules())
    for module in shown(list(modules), "layers", progress):
        factors = {i: one.factors(module) for i, one in enumerate(adapters) if f"{module}.a" in one.tensors}
        found = dict(zip(factors, pool.map(directions, *zip(*factors.values(), strict=True)), strict=True))
        for i, one in found.items():
            updates[i][module] = update(len(factors[i][0]), one.s, rank)
        if len(adapters) > 1:
            pairs.add(found, factors)
            total.add(module, found, factors)
    several = len(adapters) > 1
    return Figures(updates, pairs.pairs() if several else [], total.together() if several else None)
