"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): λ Σ w ΔW, exact, at the rank that the sum has.

Negative weights take a skill away; A - B + C is the analogy "what A is to B". PEFT's method of this name adds factors,
(Σ √w B)(Σ √w A), which has cross terms B_i A_j: for four independent adapters its error is larger than the sum itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.config.merging import LinearSettings
from veneer.lowrank import concatenate
from veneer.merge.method import Merge, Merged, Parent


def linear(parents: Sequence[Parent], options: LinearSettings) -> Merged:
    """Stacked factors; what is cut from them is cut when all is added up."""
    return Merged(*concatenate([(p.a, p.b) for p in parents], [p.weight for p in parents]))


LINEAR = Merge(linear, LinearSettings, neutral={})
