"""Siblings: leaves that the model feeds the very same tensor, computed together at the first one's call.

q, k and v read one x, and so do gate and up. The model's own code calls them one after the other; while a stream is
running, the first call computes all of them by one operation (`veneer.kernels.lora.lora_linears`) and the others pick
up what is theirs. That it is the same tensor is checked at each call; one that is fed another computes anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.kernels.lora import Piece, lora_linears

if TYPE_CHECKING:
    from veneer.model.leaf import Leaf

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def family(path: str) -> str:
    """The name of the group that the layer at `path` belongs to."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.{next((names[0] for names in SIBLINGS if name in names), name)}"


class Waiting:
    """Outputs of leaves that were computed with their sibling and not called for yet."""

    def __init__(self) -> None:
        self._outputs: dict[str, Tensor] = {}
        self._fed: tuple[Tensor, int, bool] | None = None

    def output(self, leaf: Leaf, x: Tensor) -> Tensor:
        """The output (T, O) of `leaf`, which has pieces to compute for x (..., I)."""
        fed = (x, 0 if x.is_inference() else x._version, torch.is_grad_enabled())
        same = self._fed is not None and x is self._fed[0] and fed[1:] == self._fed[1:]
        if not same or leaf.path not in self._outputs:
            self._fed, self._outputs = fed, compute(leaf, x, leaf.siblings)
        y_TO = self._outputs.pop(leaf.path)
        if not self._outputs:
            self.clear()
        return y_TO

    def clear(self) -> None:
        """Lets go of tensors, also of those that nobody called for."""
        self._fed, self._outputs = None, {}


def compute(caller: Leaf, x: Tensor, leaves: list[Leaf]) -> dict[str, Tensor]:
    """path -> output (T, O) of those of `leaves` that x (..., I) fits and that have pieces; the caller is one."""
    x_TI = x.reshape(-1, caller.in_features)
    pieces: list[Piece] = []
    factors: list[tuple[Tensor, Tensor]] = []
    together: list[Leaf] = []
    for leaf in leaves:
        own = leaf.pieces(x_TI.shape[0]) if leaf.in_features == caller.in_features else []
        for span, lora in own:
            pieces.append(Piece(span.start, span.stop, len(factors), lora.scale * span.weight, len(together)))
            factors.append(lora.pair())
        together += [leaf] if own else []
    ys = lora_linears(x_TI, caller.wiring.operands(together), pieces, factors)
    return {leaf.path: y_TO for leaf, y_TO in zip(together, ys, strict=True)}
