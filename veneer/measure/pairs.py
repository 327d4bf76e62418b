"""Adapters beside each other, two by two: size, direction, shared spaces, signs, interference.

Legend: n adapters with this layer, K directions of the largest, O out, I in.

All pairs of one layer at once: with every adapter's singular vectors side by side, U and V, all there is to know stands
in blocks of the Gram matrices UᵀU and VᵀV. They are taken in float32, whose seven digits are more than anybody reads, a
block of rows at a time, which stays in the processor's cache; of both triangles one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.measure.layers import Directions

ROWS = 64  # of each update whose signs are compared: 0.4987 where all rows gave 0.4983
_MANY = 64  # adapters from which on fewer rows are taken
_BLOCK = 2**19  # entries of a Gram matrix at a time
_SAMPLED = 2**22  # entries of updates at a time whose signs are compared
_ROWS_OF_PRODUCTS = 64


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


Sums = dict[str, Tensor]  # measure -> its part of one layer, (n, n) float32; of pairs (i, j) with i < j it is right


def layer_sums(found: Sequence[Directions], factors: Sequence[tuple[Tensor, Tensor]]) -> Sums:
    """One layer of n adapters, two at least: their updates, all of one shape."""
    return _spaces(found) | _signs(factors)


@dataclass
class Pairs:
    """Every pair of `count` adapters, gathered layer by layer."""

    count: int
    _held: dict[str, Tensor] = field(default_factory=dict)
    _energy: dict[int, float] = field(default_factory=dict)

    def add(self, energies: Mapping[int, float], sums: Sums) -> None:
        """One layer. energies: place of an adapter that has it -> ‖ΔW‖²; sums: `layer_sums` of those."""
        for place, energy in energies.items():
            self._energy[place] = self._energy.get(place, 0.0) + energy
        at = torch.tensor(list(energies))
        for name, values in sums.items():
            total = self._held.setdefault(name, torch.zeros(self.count, self.count, dtype=torch.float64))
            if len(at) == self.count:
                total += values
            else:
                total[at[:, None], at] += values.double()

    def pairs(self) -> list[Pair]:
        """Of all layers added."""
        held = {name: total.tolist() for name, total in self._held.items()}
        places = [(i, j) for i in range(self.count) for j in range(i + 1, self.count)]
        return [self._pair(i, j, {name: total[i][j] for name, total in held.items()}) for i, j in places]

    def _pair(self, i: int, j: int, at: Mapping[str, float]) -> Pair:
        if not at.get("layers"):
            return Pair(i, j, 0)
        norms = [math.sqrt(self._energy[place]) for place in (i, j)]
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


def _spaces(found: Sequence[Directions]) -> Sums:
    """What the singular vectors tell."""
    n, most = len(found), max(1, *(len(one.s) for one in found))
    u_OnK, v_InK = (_beside([getattr(one, side) for one in found], most) for side in "uv")
    s_nK = torch.stack([_padded(one.s[None], most)[0] for one in found]).float()
    kept_n = torch.tensor([len(one.s) for one in found])
    sums = {name: torch.zeros(n, n) for name in ("inner", "output", "input", "interference")}
    for rows in _blocks(n, n * most * most):
        for name, values in _block(u_OnK, v_InK, s_nK, rows).items():
            sums[name][rows, rows.start :] = values
    larger = torch.maximum(kept_n[:, None], kept_n)
    fewer = torch.minimum(kept_n[:, None], kept_n).clamp(min=1)
    singular_n = s_nK.sum(1)
    return sums | {
        "layers": torch.ones(n, n),
        "output": sums["output"] / fewer,
        "input": sums["input"] / fewer,
        "output_chance": larger / len(u_OnK),
        "input_chance": larger / len(v_InK),
        "singular": singular_n[:, None] + singular_n,
    }


def _block(u_OnK: Tensor, v_InK: Tensor, s_nK: Tensor, rows: slice) -> Sums:
    """Of the adapters in `rows` beside those from the first of them on; P such pairs.

    interference: the two blocks of (UᵀU - I) S (VᵀV - I) that are not zero, since the vectors of one adapter are
    orthonormal: U_iᵀ ΔW_j V_i and U_jᵀ ΔW_i V_j. The diagonal of the first, weighted by s_i, sums to <ΔW_i, ΔW_j>.
    """
    u_PKK, v_PKK = _gram(u_OnK, rows), _gram(v_InK, rows)
    here, later = len(s_nK[rows]), len(s_nK[rows.start :])
    s_iPK = s_nK[rows].repeat_interleave(later, 0)
    s_jPK = s_nK[rows.start :].repeat(here, 1)
    first_PKK = torch.bmm(u_PKK * s_jPK[:, None], v_PKK.mT)
    second_PKK = torch.bmm((u_PKK * s_iPK[:, :, None]).mT, v_PKK)
    found = {
        "inner": (first_PKK.diagonal(dim1=1, dim2=2) * s_iPK).sum(1),
        "output": u_PKK.square_().flatten(1).sum(1),
        "input": v_PKK.square_().flatten(1).sum(1),
        "interference": first_PKK.abs_().flatten(1).sum(1) + second_PKK.abs_().flatten(1).sum(1),
    }
    return {name: values.view(here, later) for name, values in found.items()}


def _signs(factors: Sequence[tuple[Tensor, Tensor]]) -> Sums:
    """Of sampled rows of the updates, the same ones of all: sums of products, of their sizes, and of their signs."""
    n, outputs, inputs = len(factors), len(factors[0][1]), factors[0][0].shape[1]
    sample = torch.randperm(outputs, generator=torch.Generator().manual_seed(0))[: max(8, ROWS // (1 + n // _MANY))]
    sums = {name: torch.zeros(n, n) for name in ("products", "sizes", "agreed", "signed")}
    for rows in sample.split(max(1, _SAMPLED // (inputs * n))):
        x_nE = torch.stack([(b_OR[rows] @ a_RI).flatten() for a_RI, b_OR in factors])
        size_nE, sign_nE = x_nE.abs(), x_nE.sign()
        _add_products(sums["products"], x_nE)
        _add_products(sums["sizes"], size_nE)
        _add_products(sums["agreed"], sign_nE)
        if size_nE.all():
            sums["signed"] += size_nE.shape[1]
        else:
            _add_products(sums["signed"], sign_nE.abs())
    return sums


def _add_products(total_nn: Tensor, x_nE: Tensor) -> None:
    """Adds x xᵀ, of which the part below the blocks on the diagonal is left out."""
    for start in range(0, len(x_nE), _ROWS_OF_PRODUCTS):
        rows = slice(start, start + _ROWS_OF_PRODUCTS)
        total_nn[rows, start:] += x_nE[rows] @ x_nE[start:].mT


def _over(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _beside(vectors: Sequence[Tensor], most: int) -> Tensor:
    """(N, n, K) of n matrices (N, up to K), with columns of zeros where directions are fewer."""
    together = vectors[0].new_zeros(len(vectors[0]), len(vectors), most, dtype=torch.float32)
    for place, one in enumerate(vectors):
        together[:, place, : one.shape[1]] = one
    return together


def _padded(x_NK: Tensor, most: int) -> Tensor:
    return torch.nn.functional.pad(x_NK, (0, most - x_NK.shape[1]))


def _gram(x_NnK: Tensor, rows: slice) -> Tensor:
    """(P, K, K): the products of the vectors of the adapters in `rows` with those from the first of them on."""
    left, right = x_NnK[:, rows], x_NnK[:, rows.start :]
    flat = left.flatten(1).mT @ right.flatten(1)
    most = x_NnK.shape[2]
    return flat.view(-1, most, right.shape[1], most).transpose(1, 2).reshape(-1, most, most)


def _blocks(count: int, entries: int) -> Iterator[slice]:
    """Of so many rows, which have so many entries each."""
    step = max(1, _BLOCK // entries)
    yield from (slice(start, min(start + step, count)) for start in range(0, count, step))
