"""DARE (Yu et al. 2023, arXiv 2311.03099): drop random entries of each adapter, scale up the rest. On those of `rows`.

Then the sum (`dare_linear`), or the mean of those whose sign wins (`dare_ties`). What is dropped is noise of
√((1 - p) / p) of ‖ΔW‖ at density p, as on dense entries: harmless for the small updates of full fine-tuning, as large
as the update itself at the default of 0.5 for an adapter. Masks are drawn by seed and parent, not by place.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.config.merging import DareSettings
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.rows import merge_rows


def dare_linear(parents: Sequence[Parent], options: DareSettings) -> Merged:
    """Σ of the thinned w ΔW."""
    return merge_rows(parents, options, "dare_linear")


def dare_ties(parents: Sequence[Parent], options: DareSettings) -> Merged:
    """The thinned w ΔW merged by sign; weights are relative."""
    return merge_rows(parents, options, "dare_ties")


DARE_LINEAR = Merge(dare_linear, DareSettings, neutral={"density": 1.0})
DARE_TIES = Merge(dare_ties, DareSettings, neutral={"density": 1.0})
