"""Kept apart from earlier adapters, so that merging adds what does not meet: O-LoRA's term, and a start without it.

Legend: N layers of one shape, E experts of a layer, R rank, I in, K directions that earlier adapters read.

O-LoRA (Wang et al. 2023, arXiv 2310.14152) adds λ Σ ‖A Aⱼᵀ‖² over layers and earlier adapters j to the loss. How large
that is depends on how Bⱼ Aⱼ is split into factors, which other software does in other ways. Here Vⱼ stands for Aⱼ: the
orthonormal directions that ΔWⱼ reads, the same for every split. So the term is the squared length of A inside of them.
Its gradient is 2λ A VᵀV: two thin products a step, outside of the recorded and compiled pass, exact however a step is
cut into passes and processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.lowrank import NEGLIGIBLE
from veneer.methods.lora import LoRA


def basis_of(read_KI: Tensor) -> Tensor:
    """Orthonormal rows of the same space, float64; rows of zeros where there are fewer than K. A leading E is kept."""
    _, s_K, vt_KI = torch.linalg.svd(read_KI.double(), full_matrices=False)
    kept_K = (s_K > NEGLIGIBLE * s_K[..., :1]) & (s_K > 0)
    return vt_KI * kept_K[..., None]


def outside(a_RI: Tensor, basis_KI: Tensor) -> Tensor:
    """A without its part in the space of the basis, each row as long as it was; in A's dtype. A leading E is kept."""
    wide_RI = a_RI.double()
    rest_RI = wide_RI - (wide_RI @ basis_KI.mT) @ basis_KI
    lengths_R, left_R = (torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (wide_RI, rest_RI))
    return (rest_RI * (lengths_R / left_R.clamp_min(torch.finfo(torch.float64).tiny))).to(a_RI.dtype)


def start_outside(method: LoRA, spaces: Sequence[Tensor]) -> None:
    """Changes A to lie outside of these spaces, each given by orthonormal rows (K, I), or (E, K, I) of experts."""
    if not spaces:
        return
    basis_KI = spaces[0] if len(spaces) == 1 else basis_of(torch.cat(list(spaces)))
    method.a_RI.data.copy_(outside(method.a_RI.data.cpu(), basis_KI))


class Orthogonality:
    """Of an adapter that trains, to those it is to be merged with.

    methods: what trains, by path. read: path -> what earlier adapters read there (K, I), or (E, K, I) of experts: the
    orthonormal rows of each adapter, one after the other. about: what a report tells of them.
    """

    def __init__(
        self,
        methods: Mapping[str, LoRA],
        read: Mapping[str, Tensor],
        weight: float,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.weight, self.about = weight, dict(about or {})
        self.methods = {path: methods[path] for path in read}
        self.bases = {path: basis_of(read_KI) for path, read_KI in read.items()}
        self.read = read
        self.stacks: list[tuple[list[nn.Parameter], Tensor]] = []
        self.share_at_start = self.share()

    def taken(self, path: str) -> int:
        """How many directions of this layer's inputs are read; of experts, by the one that reads most."""
        return int((self.bases[path].square().sum(-1) > 0).sum(-1).max())

    def _stacked(self) -> list[tuple[list[nn.Parameter], Tensor]]:
        """The factors of layers of one shape, and what is read there (N, K, I): made once they are where they train."""
        if not self.stacks:
            shapes: dict[Any, list[str]] = {}
            for path, method in self.methods.items():
                shapes.setdefault((method.a_RI.shape, self.read[path].shape), []).append(path)
            for paths in shapes.values():
                factors = [self.methods[path].a_RI for path in paths]
                self.stacks.append((factors, torch.stack([self.read[path] for path in paths]).to(factors[0])))
        return self.stacks

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Adds the term's gradient to those of A; returns the term, a scalar tensor in float64 on A's device."""
        total = torch.zeros((), dtype=torch.float64, device=next(iter(self.methods.values())).a_RI.device)
        if self.weight == 0:
            return total
        for factors, read_NKI in self._stacked():
            inside_NRK = torch.stack([factor.data for factor in factors]) @ read_NKI.mT
            pulls_NRI = inside_NRK @ read_NKI
            torch._foreach_add_([factor.grad for factor in factors], list(pulls_NRI.unbind()), alpha=2 * self.weight)
            total += inside_NRK.double().square().sum()
        return total * self.weight

    def share(self) -> float:
        """Of ‖A‖², what lies in the space that earlier adapters read; the mean over layers, 0 to 1."""
        shares = []
        for path, method in self.methods.items():
            a_RI = method.a_RI.detach().cpu().double()
            whole = float(a_RI.square().sum())
            shares.append(float((a_RI @ self.bases[path].mT).square().sum()) / whole if whole else 0.0)
        return sum(shares) / len(shares)

    @property
    def chance(self) -> float:
        """The share of factors drawn at random."""
        sizes = [basis_KI.square().sum(-1).sum(-1).mean() / basis_KI.shape[-1] for basis_KI in self.bases.values()]
        return float(sum(sizes)) / len(sizes)

    def facts(self) -> dict[str, Any]:
        """For card and report: to what, how, and the share before the first step and now."""
        told = {"at_start": self.share_at_start, "at_end": self.share(), "of_random_factors": self.chance}
        return {**self.about, "overlap": {name: float(f"{share:.4g}") for name, share in told.items()}}
