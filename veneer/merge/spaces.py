"""The updates of one layer in small common coordinates: ΔW = Q_b M Q_aᵀ for every parent, with shared Q_b and Q_a.

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
    """All parents in the frames of what they write (left) and read (right): ΔW = left · u diag(s) vᵀ · rightᵀ, float64.

    Weights are not in `tasks`. A parent whose products cancel to rounding has no directions there.
    """

    left: Frame
    right: Frame
    tasks: list[Small]
    weights: list[float]

    @cached_property
    def matrices(self) -> list[Tensor]:
        """w ΔW of every parent, (K, K)."""
        return [(task.u * task.s * w) @ task.v.mT for task, w in zip(self.tasks, self.weights, strict=True)]

    def within(self, left_KD: Tensor, right_KE: Tensor) -> list[tuple[Tensor, Tensor]]:
        """leftᵀ w ΔW right of every parent, as two factors (D, R) and (R, E)."""
        return [
            (left_KD.mT @ (task.u * task.s * w), task.v.mT @ right_KE)
            for task, w in zip(self.tasks, self.weights, strict=True)
        ]

    @property
    def size(self) -> float:
        """The largest singular value of any w ΔW."""
        found = [abs(w) * float(task.s[0]) for task, w in zip(self.tasks, self.weights, strict=True) if len(task.s)]
        return max(found, default=0.0)

    def merged(self, left_KD: Tensor, right_KD: Tensor, **more: float) -> Merged:
        """The result left · rightᵀ, out of the small coordinates."""
        return Merged(self.right.lift(right_KD).mT, self.left.lift(left_KD), **more)  # type: ignore[arg-type]


def core_of(parents: Sequence[Parent], exact: bool) -> Core:
    """The frames of the stacked factors, and every parent in them, at the cost of its own rank."""
    left, right = frame(torch.cat([p.b for p in parents], 1), exact), frame(torch.cat([p.a for p in parents]).mT, exact)
    ranks = [len(p.a) for p in parents]
    parts = zip(left.coords_KR.split(ranks, 1), right.coords_KR.split(ranks, 1), strict=True)
    return Core(left, right, [_task(p_KR, q_KR) for p_KR, q_KR in parts], [p.weight for p in parents])


def _task(p_KR: Tensor, q_KR: Tensor) -> Small:
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(p_KR), torch.linalg.qr(q_KR)
    found = small_svd(r_b @ r_a.mT, size=float((p_KR.norm(dim=0) * q_KR.norm(dim=0)).max()))
    return Small(q_b @ found.u, found.s, q_a @ found.v)


def orthogonal(x_KD: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (Procrustes); with orthonormal rows where it has more columns.

    Directions that X does not have stay absent.
    """
    found = small_svd(x_KD)
    return found.u @ found.v.mT
