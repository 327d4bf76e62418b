"""Concatenation: A below A, w B beside w B. Exact to the bit of every product; the ranks add up."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.config.merging import CatSettings
from veneer.lowrank import concatenate
from veneer.merge.method import Merge, Merged, Parent


def cat(parents: Sequence[Parent], options: CatSettings) -> Merged:
    """The factors as they are."""
    return Merged(*concatenate([(p.a, p.b) for p in parents], [p.weight for p in parents]))


CAT = Merge(cat, CatSettings, neutral={}, stacked=True)
