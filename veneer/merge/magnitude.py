"""Magnitude pruning: of each adapter only the largest entries, then the sum. Where entries are compared: `rows`.

There, keeping the largest is the best that any choice of entries can do: the squared error is the sum of the squares
of those that go.
"""

from __future__ import annotations

from collections.abc import Sequence

from veneer.config.merging import MagnitudeSettings
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.rows import merge_rows


def magnitude(parents: Sequence[Parent], options: MagnitudeSettings) -> Merged:
    """Σ of the trimmed w ΔW."""
    return merge_rows(parents, options, "magnitude")


MAGNITUDE = Merge(magnitude, MagnitudeSettings, neutral={"density": 1.0})
