"""TSV-M (Gargiulo et al. 2024, arXiv 2412.00081): the tasks' singular vectors, made orthogonal to each other, summed.

The paper keeps min(O, I) / k directions of each of k tasks; an adapter has fewer, so all stay. In the small
coordinates this is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.config.merging import TsvSettings
from veneer.merge.method import Merge, Merged, Parent
from veneer.merge.spaces import core_of, orthogonal


def tsv_m(parents: Sequence[Parent], options: TsvSettings) -> Merged:
    """U' diag(w s) V'ᵀ with U', V' nearest to the tasks' vectors side by side."""
    core = core_of(parents, options.exact)
    u_KD = torch.cat([task.u for task in core.tasks], dim=1)
    v_KD = torch.cat([task.v for task in core.tasks], dim=1)
    s_D = torch.cat([task.s * weight for task, weight in zip(core.tasks, core.weights, strict=True)])
    return core.merged(orthogonal(u_KD) * s_D, orthogonal(v_KD))


TSV_M = Merge(tsv_m, TsvSettings, neutral={})
