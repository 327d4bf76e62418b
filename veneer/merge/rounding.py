"""What storing base + update keeps of the update: in a float of fewer bits, or in 4 bits.

Legend: I in, O out. E = stored - (W + ΔW), what rounding puts there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from veneer.bases.base import Base
from veneer.bases.lookup import Lookup
from veneer.methods.base import Method
from veneer.model.quantised import storage_class


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Of one layer: ‖E‖, ‖ΔW‖ and the inner product of E and ΔW."""

    error: float
    norm: float
    along: float

    @property
    def relative(self) -> float:
        return self.error / self.norm if self.norm else 0.0


Roundings = Mapping[str, Rounding]  # by layer
Store = Callable[[Tensor], Tensor]  # a weight in float32 -> the values that are kept of it


def rounding(method: Method, base: Base, store: Store) -> Rounding:
    """What `store` makes of base + update. A table that grew is compared with zeros where the base had no rows."""
    merged_OI, before_OI = method.merged(base), base.dense()
    error_OI = store(merged_OI).float() - merged_OI
    update_OI = merged_OI.clone()
    update_OI[tuple(slice(size) for size in before_OI.shape)] -= before_OI
    along = (error_OI * update_OI).sum(dtype=torch.float64).item()
    return Rounding(torch.linalg.vector_norm(error_OI).item(), method.update_norm(base), along)


def store_of(base: Base, dtype: torch.dtype, storage: str) -> Store:
    """How this layer is stored: rounded to dtype, and a linear layer's weight then quantised to `storage`."""
    if storage == "dense" or isinstance(base, Lookup):
        return lambda weight: weight.to(dtype)
    kind = storage_class(storage)
    return lambda weight: kind.from_weight(weight.to(dtype)).dense()


def overall(layers: Roundings) -> Rounding:
    """All layers as one."""
    every = layers.values()
    error, norm = (math.sqrt(sum(getattr(one, name) ** 2 for one in every)) for name in ("error", "norm"))
    return Rounding(error, norm, sum(one.along for one in every))


def kept(one: Rounding) -> float:
    """Share of ΔW in what was stored, its projection on ΔW: 1 is all of it, 0 nothing; about 1 wherever rounding
    errors are independent of the update."""
    return 1 + one.along / one.norm**2 if one.norm else 1.0
