"""Merging entry by entry: what the papers define on dense updates, on updates in any common basis.

A parent's weighted update w ΔW comes as a product left_NR · right_RD, in coordinates (N, D) that all parents share. It
is formed a piece of rows at a time, which stays in the processor's cache while all k parents meet there; to form it
again takes less time than to write it to memory and read it back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from veneer.config.merging import DareSettings, Elementwise, MagnitudeSettings
from veneer.merge.method import Parent

TIED = 1e-6  # of the entries' sizes
PIECE = 2**16  # entries of each parent merged at a time

Update = tuple[Tensor, Tensor]  # left (N, R), right (R, D)


def merge_entries(
    updates: Sequence[Update], parents: Sequence[Parent], options: MagnitudeSettings, how: Elementwise
) -> Tensor:
    """One update (N, D) by the element-wise method of that name."""
    (left_NR, right_RD), weights = updates[0], [parent.weight for parent in parents]
    merged_ND = left_NR.new_zeros(len(left_NR), right_RD.shape[1])
    if not merged_ND.numel():  # the parents hold nothing but rounding
        return merged_ND
    thin = _thinning(updates, parents, options, how)
    for rows in _pieces(*merged_ND.shape):
        stack_knD = thin(torch.stack([left_NR[rows] @ right_RD for left_NR, right_RD in updates]))
        merged_ND[rows] = agreed(stack_knD, weights) if how in ("ties", "dare_ties") else stack_knD.sum(0)
    return merged_ND


def _thinning(
    updates: Sequence[Update], parents: Sequence[Parent], options: MagnitudeSettings, how: Elementwise
) -> Callable[[Tensor], Tensor]:
    """From the entries of a piece to those that stay; asked for one piece after the other."""
    if how in ("magnitude", "ties"):
        limits = [smallest_kept(*update, options.density) for update in updates]
        return lambda stack_knD: trimmed(stack_knD, limits)
    if how in ("dare_linear", "dare_ties") and options.density < 1:
        assert isinstance(options, DareSettings)
        draws = [_generator(parent.key, options.seed) for parent in parents]
        return lambda stack_knD: dropped(stack_knD, draws, options.density)
    return lambda stack_knD: stack_knD


def _pieces(count_N: int, count_D: int) -> list[slice]:
    """Of the rows. In sixteens, so that all pieces lie in memory alike, and products of them round alike."""
    step = max(16, PIECE // count_D // 16 * 16)
    return [slice(first, first + step) for first in range(0, count_N, step)]


def smallest_kept(left_NR: Tensor, right_RD: Tensor, density: float) -> float:
    """The size of the smallest entry of left · right among the share `density` of those that are largest."""
    sizes_ND = left_NR.new_empty(len(left_NR), right_RD.shape[1])
    for rows in _pieces(*sizes_ND.shape):
        sizes_ND[rows] = (left_NR[rows] @ right_RD).abs_()
    cut = sizes_ND.numel() - max(1, round(density * sizes_ND.numel()))  # entries to go
    sizes_n = sizes_ND.view(-1).numpy()
    sizes_n.partition(cut)  # numpy's selection takes an eighth of the time of torch's
    return float(sizes_n[cut])


def trimmed(stack_kND: Tensor, limits: Sequence[float]) -> Tensor:
    """Of each parent the entries of that size or larger, the others zero.

    All entries as large as the last one to stay do stay, so that an update of equal entries is not lost.
    """
    below_k = torch.nextafter(stack_kND.new_tensor(limits), stack_kND.new_zeros(())).tolist()
    # `where` takes 13 times as long.
    kept = [hardshrink(entry_ND, below) for entry_ND, below in zip(stack_kND, below_k, strict=True)]
    return torch.stack(kept)


def dropped(stack_kND: Tensor, draws: Sequence[torch.Generator], density: float) -> Tensor:
    """Of each parent a random share `density` of entries, divided by it, so that the expectation stays (DARE)."""
    kept_kND = torch.stack([torch.rand(stack_kND.shape[1:], generator=draw) < density for draw in draws])
    return stack_kND * kept_kND / density


def _generator(key: str, seed: int) -> torch.Generator:
    """Of the parent's own draws: they depend on the seed and its key alone."""
    digest = hashlib.sha256(json.dumps([key, seed]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def agreed(stack_kND: Tensor, weights: Sequence[float]) -> Tensor:
    """Elects the sign of each entry's sum, and takes the weighted mean of the entries that have it (TIES).

    Weights are relative therefore: a parent that nobody contradicts comes back as it is. Opposite entries of equal size
    elect nobody, whatever rounding has left of their sum.
    """
    sum_ND, size_ND = stack_kND.sum(0), stack_kND.abs().sum(0)
    sign_ND = sum_ND.sign() * (sum_ND.abs() > TIED * size_ND)
    agreeing_kND = (stack_kND * sign_ND).relu_()
    total_ND = agreeing_kND.sum(0) * sign_ND
    voters_ND = torch.tensordot(stack_kND.new_tensor(weights).abs(), agreeing_kND.sign_(), 1)
    return total_ND / torch.where(voters_ND > 0, voters_ND, 1.0)
