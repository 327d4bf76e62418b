"""What a merge left, by kind of layer: `model.layers.*.mlp.up_proj` in one line instead of one for each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

WHOLE = 1 - 1e-9  # share of the squared norm above which nothing but rounding was left out


class Cut(Protocol):
    """A layer at the rank that it was brought to: kept is the share of ‖ΔW‖² left, error the norm of what was not."""

    @property
    def rank(self) -> int: ...
    @property
    def norm(self) -> float: ...
    @property
    def kept(self) -> float: ...
    @property
    def error(self) -> float: ...


def kind_of(module: str) -> str:
    """The module's path without its numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def share_kept(layers: Mapping[str, Cut]) -> float:
    """Of the squared norm of all of them."""
    kept = math.fsum(layer.norm**2 for layer in layers.values())
    lost = math.fsum(layer.error**2 for layer in layers.values())
    return kept / (kept + lost) if kept + lost else 1.0


def by_kind(layers: Mapping[str, Cut]) -> list[dict[str, Any]]:
    """A row for each kind: how many layers, their ranks, kept, error (relative), and the worst of them."""
    kinds: dict[str, dict[str, Cut]] = {}
    for module, layer in layers.items():
        kinds.setdefault(kind_of(module), {})[module] = layer
    return [{"layers": kind, **_row(members)} for kind, members in kinds.items()]


def _row(members: Mapping[str, Cut]) -> dict[str, Any]:
    ranks = sorted({layer.rank for layer in members.values()})
    worst = min(members, key=lambda module: members[module].kept)
    kept, least = share_kept(members), members[worst].kept
    return {
        "count": len(members),
        "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
        "kept": kept,
        "error": math.sqrt(max(0.0, 1 - kept)),
        "worst": worst if least < WHOLE else None,
        "worst_kept": least,
    }
