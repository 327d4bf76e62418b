"""Siblings: leaves that the model feeds the very same tensor, computed together at the first one's call.

q, k and v read one x, and so do gate and up. The model's own code calls them one after the other; the first call
computes all of them by one operation (`veneer.kernels.lora.lora_linears`) and the others pick up what is theirs. That
it is the same tensor is checked at each call, so a model that feeds them different ones is served one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from veneer.kernels.lora import Piece, lora_linears

if TYPE_CHECKING:
    from veneer.model.leaf import Leaf

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Siblings:
    """The leaves of one group, and the outputs that wait for their leaves to be called."""

    def __init__(self) -> None:
        self._leaves: dict[str, Leaf] = {}
        self._x: Tensor | None = None
        self._version = 0
        self._waiting: dict[str, Tensor] = {}

    def add(self, leaf: Leaf) -> None:
        self._leaves[leaf.path] = leaf

    def output(self, leaf: Leaf, x: Tensor) -> Tensor:
        """The output (T, O) of `leaf`, which has pieces to compute for x (..., I)."""
        version = 0 if x.is_inference() else x._version
        if x is not self._x or version != self._version or leaf.path not in self._waiting:
            self._x, self._version, self._waiting = x, version, self._compute(leaf, x)
        y_TO = self._waiting.pop(leaf.path)
        if not self._waiting:
            self._x = None
        return y_TO

    def _compute(self, caller: Leaf, x: Tensor) -> dict[str, Tensor]:
        x_TI = x.reshape(-1, caller.in_features)
        pieces: list[Piece] = []
        factors: list[tuple[Tensor, Tensor]] = []
        together: list[Leaf] = []
        for leaf in self._leaves.values():
            own = leaf.pieces(x_TI.shape[0])
            if not own:
                continue
            for span, lora in own:
                pieces.append(Piece(span.start, span.stop, len(factors), lora.scale * span.weight, len(together)))
                factors.append((lora.a_RI, lora.b_OR))
            together.append(leaf)
        ys = lora_linears(x_TI, [leaf.base for leaf in together], pieces, factors)
        return {leaf.path: y_TO for leaf, y_TO in zip(together, ys, strict=True)}


def family(path: str) -> str:
    """The name of the group that the layer at `path` belongs to."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.{next((names[0] for names in SIBLINGS if name in names), name)}"
