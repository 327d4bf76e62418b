"""LoRA on a layer's experts: factors for each of them, held together as transformers holds their weights.

Legend: S rows, those of one expert together; E experts, I in, O out, R rank of each.
"""

from __future__ import annotations

import math

from torch import Tensor

from veneer.bases.base import Base
from veneer.kernels.grouped import grouped_pair
from veneer.lowrank import norm
from veneer.methods.lora import LoRA


class ExpertLoRA(LoRA):
    """Factors a (E, R, I), b (E, O, R), float32, and one scale s. All that LoRA gives has E in front."""

    @property
    def rank(self) -> int:
        return self.a_RI.shape[1]

    @property
    def experts(self) -> int:
        return len(self.a_RI)

    def routed(self, x_SI: Tensor, ends_E: Tensor) -> Tensor:
        """Δ (S, O) of rows in the order of their experts, in x's dtype. ends_E: where each expert's rows end."""
        return grouped_pair(x_SI, self.a_RI, self.b_OR, ends_E) * self.scale

    def delta(self, x_TI: Tensor, y_TO: Tensor, base: Base, gate_TR: Tensor | None = None) -> Tensor:
        raise NotImplementedError("experts see the rows that are routed to them: `routed`")

    def merged(self, base: Base) -> Tensor:
        a_ERI, b_EOR = self.plain()
        return base.dense().baddbmm_(b_EOR, a_ERI)

    def update_norm(self, base: Base) -> float:
        return math.hypot(*(norm(a_RI, b_OR) for a_RI, b_OR in zip(*self.plain(), strict=True)))
