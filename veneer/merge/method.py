"""The contract of a merge method: the updates of one layer in several adapters -> one update.

Legend: R rank, I in, O out.

Laws (tests/contract/test_merges.py): at the neutral options A alone, and A beside an adapter of zeros, give A;
the order of the parents does not count unless the method says so; nor does how an update is split into factors, where
the singular values of what is stacked are separated; inputs are never changed; the same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from veneer.config.merging import CatSettings
from veneer.merge.on_base import OnBase


@dataclass(frozen=True)
class Inputs:
    """What a layer reads on some rows: the mean of q qᵀ over their tokens, q = basisᵀ x, float64.

    basis (I, K) is orthonormal, and holds the directions that every parent of the layer reads.
    """

    basis_IK: Tensor
    gram_KK: Tensor


@dataclass(frozen=True)
class Parent:
    """One adapter's update of one layer, b @ a with a (R, I) and b (O, R), and its weight.

    key: whose it is and which layer; random choices depend on it, never on the place in the list. slot: where it is on
    the base, and inputs: what the layer reads on its rows; both for methods that read data.
    """

    a: Tensor
    b: Tensor
    weight: float = 1.0
    key: str = ""
    slot: str = ""
    inputs: Inputs | None = None


Stacks = Mapping[str, Sequence[Parent]]  # layer -> its parents


class Merged(NamedTuple):
    """Factors a (R, I), b (O, R) of the result, of whatever rank comes naturally.

    rank: the most directions that the method means to keep. left_out: Frobenius norm of what it has already left out.
    degenerate: singular values of a shared basis coincide, so that the result depends on rounding. The factors may be
    float64.
    """

    a: Tensor
    b: Tensor
    rank: int | None = None
    left_out: float = 0.0
    degenerate: bool = False


@dataclass(frozen=True)
class Merge:
    """A merge method.

    factors: (parents, settings) -> result; at least one parent, none of them zero or of weight 0. settings: its
    options. neutral: options at which a parent of weight 1 comes back; None where there are none. ordered: whether
    the order of the parents counts. stacked: the result is the plain stack of factors, which nothing is cut from.
    learn: (layers, the base with parents and rows, settings, whether to show progress) -> the layers with what
    `factors` needs, and what was found, for the report; None for a method that reads no data.
    """

    factors: Callable[[Sequence[Parent], Any], Merged]
    settings: type[CatSettings]
    neutral: Mapping[str, Any] | None
    ordered: bool = False
    stacked: bool = False
    learn: Callable[[Stacks, OnBase, Any, bool], tuple[Stacks, dict[str, Any]]] | None = None
