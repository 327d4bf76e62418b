"""LoRA from a start that is not zero: PiSSA and its kin, with the base left as it is.

Those papers take their start out of the base: W - s B₀A₀ + s B A. Here W stays, whoever else speaks through it, and the
start stays beside as an anchor: ΔW = s (B A - B₀ A₀), the same function and the same gradients.

Legend: I in, O out, R rank of what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.methods.lora import LoRA


class AnchoredLoRA(LoRA):
    """Factors a, b and the anchor that they start as, float32. As plain factors its rank is 2R, and exact.

    BA - B₀A₀ is computed as (B - B₀) A + B₀ (A - A₀): zero to the bit at the start, and what has been learned is not
    rounded at the size of the start when products run in bfloat16.
    """

    a0_RI: Tensor
    b0_OR: Tensor

    def __init__(self, a_RI: Tensor, b_OR: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(a_RI, b_OR, scale, dropout)
        self.register_buffer("a0_RI", a_RI.detach().clone(), persistent=False)
        self.register_buffer("b0_OR", b_OR.detach().clone(), persistent=False)

    @property
    def rank(self) -> int:
        return 2 * self.a_RI.shape[0]

    def pair(self) -> tuple[Tensor, Tensor]:
        a = torch.cat([self.a_RI, self.a_RI - self.a0_RI])
        return a, torch.cat([self.b_OR - self.b0_OR, self.b0_OR], 1)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scale: float, dropout: float = 0.0) -> LoRA:
        """Plain LoRA of rank 2R: where it started cannot be told from what it is."""
        return LoRA.from_tensors(tensors, scale, dropout)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        rank, wanted = self.a_RI.shape[0], [tensor.shape for tensor in self.plain()]
        if [tensors["a"].shape, tensors["b"].shape] != wanted:
            raise ValueError(f"got factors of rank {len(tensors['a'])}, wanted {2 * rank}")
        learned_OR = tensors["b"][:, :rank].to(self.b_OR) / self.scale
        self.a_RI.data.copy_(tensors["a"][:rank])
        self.b_OR.data.copy_(self.b0_OR + learned_OR)
