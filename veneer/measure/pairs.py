"""Adapters beside each other, two by two: size, direction, shared spaces, signs, interference.

Legend: n adapters with this layer, K directions of the largest, O out, I in.

All pairs of one layer at once: with every adapter's singular vectors side by side, U and V, all there is to know stands
in blocks of the Gram matrices UᵀU and VᵀV. They are taken in float32, whose seven digits are more than anybody reads, a
block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.measure.layers import Directions

ROWS = 64  # of each update whose signs are compared: 0.4987 where all rows gave 0.4983
_MANY = 64  # adapters from which on fewer rows are taken
_BLOCK = 2**22  # entries of a Gram matrix at a time


@dataclass(frozen=True)
class Pair:
    """Two adapters, by their place in the list given.

    layers: that both have; without any, all else is None. norm_ratio: ‖ΔW‖ of the first over that of the second, over
    all layers. cosine: of all updates as one vector, in [-1, 1]. output, input: shared part of what they write and
    read, in [0, 1], mean over layers, beside what random spaces of these sizes would share (`lowrank.Overlap`).
    sign_conflict: share of entries whose signs differ, less the 0.5 of chance; sign_conflict_weighted: the same,
    entries weighted by |x·y|; both on a sample of rows. interference: singular task interference, ‖(UᵀU - I) S
    (VᵀV - I)‖₁ of the singular vectors side by side (Gargiulo et al. 2024, arXiv 2412.00081), mean over layers;
    interference_share: over the sum of the singular values, 1 for an adapter beside itself, 0 for orthogonal ones.
    """

    first: int
    second: int
    layers: int
    norm_ratio: float | None = None
    cosine: float | None = None
    output: float | None = None
    output_chance: float | None = None
    input: float | None = None
    input_chance: float | None = None
    sign_conflict: float | None = None
    sign_conflict_weighted: float | None = None
    interference: float | None = None
    interference_share: float | None = None


@dataclass
class Pairs:
    """Every pair of `count` adapters, gathered layer by layer."""

    count: int
    _held: dict[str, Tensor] = field(default_factory=dict)

    def add(self, found: Mapping[int, Directions], factors: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """One layer. found, factors: place of an adapter that has it -> its update; all of one shape."""
        places = list(found)
        sizes = torch.tensor([[float(one.s.square().sum())] for one in found.values()])
        self._sum("energy", places, [0], sizes)
        if len(places) > 1:
            _spaces(self._sum, places, list(found.values()))
            _signs(self._sum, places, list(factors.values()))

    def pairs(self) -> list[Pair]:
        """Of all layers added."""
        return [self._pair(i, j) for i in range(self.count) for j in range(i + 1, self.count)]

    def _sum(self, name: str, rows: Sequence[int], columns: Sequence[int], values: Tensor) -> None:
        total = self._held.setdefault(name, torch.zeros(self.count, self.count, dtype=torch.float64))
        total[torch.tensor(rows)[:, None], torch.tensor(columns)] += values.double()

    def _pair(self, i: int, j: int) -> Pair:
        at = {name: float(total[i, j]) for name, total in self._held.items()}
        if not at.get("layers"):
            return Pair(i, j, 0)
        norms = [math.sqrt(self._held["energy"][place, 0]) for place in (i, j)]
        mean = {name: at[name] / at["layers"] for name in ("output", "input", "output_chance", "input_chance")}
        return Pair(
            first=i,
            second=j,
            layers=int(at["layers"]),
            norm_ratio=norms[0] / norms[1] if norms[1] else None,
            cosine=max(-1.0, min(1.0, _over(at["inner"], norms[0] * norms[1]))),
            output=min(1.0, mean["output"]),
            output_chance=mean["output_chance"],
            input=min(1.0, mean["input"]),
            input_chance=mean["input_chance"],
            sign_conflict=-_over(at["agreed"], 2 * at["signed"]),
            sign_conflict_weighted=-_over(at["products"], 2 * at["sizes"]),
            interference=at["interference"] / at["layers"],
            interference_share=_over(at["interference"], at["singular"]),
        )


Add = Callable[[str, Sequence[int], Sequence[int], Tensor], None]


def _spaces(add: Add, places: Sequence[int], found: Sequence[Directions]) -> None:
    """What the singular vectors of one layer tell, added to the sums."""
    most = max(1, *(len(one.s) for one in found))
    u_OnK, v_InK = (_beside([getattr(one, side) for one in found], most) for side in "uv")
    s_nK = torch.stack([_padded(one.s[None], most)[0] for one in found]).float()
    kept_n = torch.tensor([len(one.s) for one in found])
    sizes = len(u_OnK), len(v_InK)
    for rows in _blocks(len(found), most):
        later = slice(rows.start, None)
        u_ijKK, v_ijKK = _gram(u_OnK, rows, later), _gram(v_InK, rows, later)
        s_i, s_j = s_nK[rows, None], s_nK[None, later]
        fewer = torch.minimum(kept_n[rows, None], kept_n[None, later]).clamp(min=1)
        larger = torch.maximum(kept_n[rows, None], kept_n[None, later])
        here, there = places[rows], places[later]
        add("layers", here, there, torch.ones(len(here), len(there)))
        add("inner", here, there, (u_ijKK * v_ijKK * s_i[..., None] * s_j[..., None, :]).sum((2, 3)))
        add("output", here, there, u_ijKK.square().sum((2, 3)) / fewer)
        add("input", here, there, v_ijKK.square().sum((2, 3)) / fewer)
        add("output_chance", here, there, larger / sizes[0])
        add("input_chance", here, there, larger / sizes[1])
        add("interference", here, there, _interference(u_ijKK, v_ijKK, s_i, s_j))
        add("singular", here, there, s_i.sum(2) + s_j.sum(2))


def _interference(u_ijKK: Tensor, v_ijKK: Tensor, s_i: Tensor, s_j: Tensor) -> Tensor:
    """The two blocks of (UᵀU - I) S (VᵀV - I) that are not zero: the vectors of one adapter are orthonormal."""
    first = (u_ijKK * s_j[..., None, :]) @ v_ijKK.mT
    second = (u_ijKK.mT * s_i[..., None, :]) @ v_ijKK
    return first.abs().sum((2, 3)) + second.abs().sum((2, 3))


def _signs(add: Add, places: Sequence[int], factors: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Of sampled rows of the updates, the same ones of all: sums of products, of their sizes, and of their signs."""
    outputs, inputs = len(factors[0][1]), factors[0][0].shape[1]
    sample = torch.randperm(outputs, generator=torch.Generator().manual_seed(0))[
        : max(8, ROWS // (1 + len(factors) // _MANY))
    ]
    for rows in sample.split(max(1, _BLOCK // (inputs * len(factors)))):
        x_nE = torch.stack([(b_OR[rows] @ a_RI).flatten() for a_RI, b_OR in factors])
        size_nE, sign_nE = x_nE.abs(), x_nE.sign()
        add("products", places, places, x_nE @ x_nE.mT)
        add("sizes", places, places, size_nE @ size_nE.mT)
        add("agreed", places, places, sign_nE @ sign_nE.mT)
        add("signed", places, places, sign_nE.abs() @ sign_nE.abs().mT)


def _over(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _beside(vectors: Sequence[Tensor], most: int) -> Tensor:
    """(N, n, K) of n matrices (N, up to K), with columns of zeros where directions are fewer."""
    return torch.stack([_padded(one, most) for one in vectors], dim=1).float()


def _padded(x_NK: Tensor, most: int) -> Tensor:
    return torch.nn.functional.pad(x_NK, (0, most - x_NK.shape[1]))


def _gram(x_NnK: Tensor, rows: slice, columns: slice) -> Tensor:
    """(i, j, K, K): the products of the vectors of the adapters in `rows` with those of the adapters in `columns`."""
    left, right = x_NnK[:, rows], x_NnK[:, columns]
    flat = left.flatten(1).mT @ right.flatten(1)
    return flat.view(*left.shape[1:], *right.shape[1:]).permute(0, 2, 1, 3)


def _blocks(count: int, most: int) -> Iterator[slice]:
    step = max(1, _BLOCK // (count * most * most))
    yield from (slice(start, min(start + step, count)) for start in range(0, count, step))
