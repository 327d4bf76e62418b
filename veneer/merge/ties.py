"""TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect a sign, mean of those that agree. On the entries of `rows`.

Signs are elected on weighted entries, and the mean is weighted too, so weights are relative; `scale` is the paper's λ.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.config.merging import TiesSettings
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.rows import merge_rows


def ties(parents: Sequence[Parent], options: TiesSettings) -> Merged:
    """Trimmed to `density` each, then merged by sign."""
    return merge_rows(parents, options, "ties")


TIES = Merge(ties, TiesSettings, neutral={"density": 1.0})
