"""Experts of one layer share a rank in a PEFT folder; after a cut they may differ. Zeros fill them up, exactly.

Legend: R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch.nn.functional import pad

from veneer.adapter.experts import parameter_of
from veneer.merge.layer import Layer


def leveled(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers, experts at the highest rank of those beside them."""
    highest: dict[str, int] = {}
    for module, layer in layers.items():
        if (parameter := parameter_of(module)) is not None:
            highest[parameter] = max(highest.get(parameter, 0), len(layer.a))
    return {
        module: layer if (parameter := parameter_of(module)) is None else _padded(layer, highest[parameter])
        for module, layer in layers.items()
    }


def _padded(layer: Layer, rank: int) -> Layer:
    more = rank - len(layer.a)
    return replace(layer, a=pad(layer.a, (0, 0, 0, more)), b=pad(layer.b, (0, more))) if more else layer
