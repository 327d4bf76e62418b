"""The updates of one layer in small common coordinates: ΔW = Q_b P Qᵀ Q_aᵀ for every parent, with shared Q_b and Q_a.

Legend: O out, I in, R rank of a parent, K directions of all parents together, D directions of a basis.

Bases that the adapters share are found here. They come from the updates, never from how an update is split into
factors: a basis of raw factors (as in the published code of Core Space) moves when B and A are scaled against each
other, which changed the result of element-wise methods by 88 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from veneer.lowrank import NEGLIGIBLE, Frame, frame
from veneer.merge.method import Merged, Parent

SEPARATED = 1e-6  # relative gap of singular values below which their vectors are a matter of rounding


@dataclass(frozen=True)
class Small:
    """An SVD of few directions: u (K, D), s (D), v (K, D); those that are rounding are left out."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def degenerate(self) -> bool:
        """Whether two of its directions could as well be two others."""
        return bool(((self.s[:-1] - self.s[1:]) < SEPARATED * self.s[:-1]).any())


def small_svd(matrix: Tensor, most: int | None = None, size: float = 0.0) -> Small:
    """Of a small matrix; at most `most` directions. size: of the terms it is a sum of, which may have cancelled."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((s > NEGLIGIBLE / 10 * s[:1].clamp(min=size)).sum())
    kept = kept if most is None else min(kept, most)
    return Small(u[:, :kept], s[:kept], vt[:kept].mT)


@dataclass(frozen=True)
class Core:
    """All parents in the frames of what they write (left) and read (right): ΔW = left · p_KR q_KRᵀ · rightᵀ, float64.

    Weights are not in the parts.
    """

    left: Frame
    right: Frame
    parts: list[tuple[Tensor, Tensor]]
    weights: list[float]

    @cached_property
    def svds(self) -> list[Small]:
        """Of every parent, at the cost of its own rank."""
        found = []
        for p_KR, q_KR in self.parts:
            (q_b, r_b), (q_a, r_a) = torch.linalg.qr(p_KR), torch.linalg.qr(q_KR)
            core = small_svd(r_b @ r_a.mT)
            found.append(Small(q_b @ core.u, core.s, q_a @ core.v))
        return found

    @cached_property
    def matrices(self) -> list[Tensor]:
        """w ΔW of every parent, (K, K)."""
        return [(p_KR * w) @ q_KR.mT for (p_KR, q_KR), w in zip(self.parts, self.weights, strict=True)]

    @property
    def size(self) -> float:
        """The largest singular value of any w ΔW."""
        found = [abs(w) * float(task.s[0]) for task, w in zip(self.svds, self.weights, strict=True) if len(task.s)]
        return max(found, default=0.0)

    def outputs(self) -> Small:
        """U and s of [ΔW ... ΔW], side by side: the directions that the parents write."""
        return small_svd(torch.cat([task.u * task.s for task in self.svds], dim=1))

    def inputs(self) -> Small:
        """V (as u) and s of the ΔW one below the other: the directions that the parents read."""
        return small_svd(torch.cat([task.v * task.s for task in self.svds], dim=1))

    def merged(self, left_KD: Tensor, right_KD: Tensor, **more: float) -> Merged:
        """The result left · rightᵀ, out of the small coordinates."""
        return Merged(self.right.lift(right_KD).mT, self.left.lift(left_KD), **more)  # type: ignore[arg-type]


def core_of(parents: Sequence[Parent], exact: bool) -> Core:
    """The frames of the stacked factors, and every parent's columns in them."""
    left, right = frame(torch.cat([p.b for p in parents], 1), exact), frame(torch.cat([p.a for p in parents]).mT, exact)
    ranks = [len(p.a) for p in parents]
    parts = zip(left.coords_KR.split(ranks, 1), right.coords_KR.split(ranks, 1), strict=True)
    return Core(left, right, list(parts), [p.weight for p in parents])


def orthogonal(x_KD: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (Procrustes); with orthonormal rows where it has more columns.

    Directions that X does not have stay absent.
    """
    found = small_svd(x_KD)
    return found.u @ found.v.mT
