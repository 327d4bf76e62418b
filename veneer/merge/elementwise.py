"""Merging entry by entry: what the papers define on dense updates, on updates in any common basis.

Shapes: stack_kND, k parents' weighted updates w ΔW in coordinates (N, D) that all of them share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from veneer.config.merging import DareSettings, Elementwise, MagnitudeSettings
from veneer.merge.method import Parent

TIED = 1e-6  # of the entries' sizes


def merge_entries(stack_kND: Tensor, parents: Sequence[Parent], options: MagnitudeSettings, how: Elementwise) -> Tensor:
    """One update (N, D) by the element-wise method of that name."""
    if not stack_kND[0].numel():  # the parents hold nothing but rounding
        return stack_kND.sum(0)
    if how in ("magnitude", "ties"):
        stack_kND = trimmed(stack_kND, options.density)
    elif how in ("dare_linear", "dare_ties"):
        assert isinstance(options, DareSettings)
        stack_kND = dropped(stack_kND, [parent.key for parent in parents], options.density, options.seed)
    if how in ("ties", "dare_ties"):
        return agreed(stack_kND, [parent.weight for parent in parents])
    return stack_kND.sum(0)


def trimmed(stack_kND: Tensor, density: float) -> Tensor:
    """Of each parent the share `density` of entries that are largest, the others zero.

    All entries as large as the last one to stay do stay, so that an update of equal entries is not lost.
    """
    count = stack_kND[0].numel()
    cut = count - max(1, round(density * count))  # entries to go
    sizes_kND = stack_kND.abs()
    # numpy's selection takes a twentieth of the time of torch's.
    sorted_kn = np.partition(sizes_kND.flatten(1).cpu().numpy(), cut, axis=1)
    limit_k = torch.from_numpy(sorted_kn[:, cut].copy()).to(sizes_kND.device)
    return torch.where(sizes_kND >= limit_k[:, None, None], stack_kND, 0.0)


def dropped(stack_kND: Tensor, keys: Sequence[str], density: float, seed: int) -> Tensor:
    """Of each parent a random share `density` of entries, divided by it, so that the expectation stays (DARE).

    Which ones depends on the seed and the parent's key alone.
    """
    if density == 1:
        return stack_kND
    masks = [_mask(stack_kND.shape[1:], key, density, seed) for key in keys]
    return stack_kND * torch.stack(masks).to(stack_kND.device) / density


def _mask(shape: torch.Size, key: str, density: float, seed: int) -> Tensor:
    digest = hashlib.sha256(json.dumps([key, seed]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.rand(shape, generator=generator) < density


def agreed(stack_kND: Tensor, weights: Sequence[float]) -> Tensor:
    """Elects the sign of each entry's sum, and takes the weighted mean of the entries that have it (TIES).

    Weights are relative therefore: a parent that nobody contradicts comes back as it is. Opposite entries of equal size
    elect nobody, whatever rounding has left of their sum.
    """
    above_ND, below_ND, voters_ND = (torch.zeros_like(stack_kND[0]) for _ in range(3))
    for entry_ND in stack_kND:  # one after the other: all at once is slower, and takes several times the memory
        above_ND += entry_ND.clamp(min=0)
        below_ND += entry_ND.clamp(max=0)
    sum_ND = above_ND + below_ND
    sign_ND = sum_ND.sign() * (sum_ND.abs() > TIED * (above_ND - below_ND))
    for entry_ND, weight in zip(stack_kND, weights, strict=True):
        voters_ND.add_(entry_ND * sign_ND > 0, alpha=abs(weight))
    total_ND = torch.where(sign_ND > 0, above_ND, below_ND) * (sign_ND != 0)
    return total_ND / torch.where(voters_ND > 0, voters_ND, 1.0)
