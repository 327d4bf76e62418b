"""Intruder dimensions: strong directions of a tuned weight that are like none of the base's (arXiv 2410.21228).

Legend: O out, I in, k strongest directions.

A strong left singular vector of W + ΔW is an intruder if its cosine with every left singular vector of W stays below a
threshold. All of them need a whole SVD. But a cosine above the threshold with any one settles it, and a strong vector
of a healthy layer is close to one of W's own strong vectors. So a partial SVD is tried first; where its vectors have
not converged, or a cosine leaves the question open, the whole one is taken. The answer is that of the whole one.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRONGEST = 10  # directions of the tuned weight that are looked at
THRESHOLD = 0.5  # of the cosine
_SETTLED = 0.1  # sine of the angle by which a vector of the partial SVD may be off: residual over gap (Davis-Kahan)
_SURE = THRESHOLD + 3 * _SETTLED  # a cosine of two such vectors that the exact ones cannot bring below the threshold
_MORE, _ROUNDS = 100, 10  # of the partial SVD: directions beside those wanted, products with W Wᵀ
_SMALL = 1024  # sides up to which the whole one costs no more


def cosines(base_OI: Tensor, tuned_OI: Tensor, strongest: int = STRONGEST) -> Tensor:
    """Of the strongest left singular vectors of the tuned weight: the largest |cosine| with any of the base's, (k).

    Where above the threshold, the cosine may be larger than told by the partial SVD. float32, on the base's device.
    """
    base_OI, tuned_OI = base_OI.float(), tuned_OI.float()
    count = min(strongest, *base_OI.shape)
    if min(base_OI.shape) > _SMALL:
        base_OK, base_K = _partial(base_OI, count)
        tuned_OK, tuned_K = _partial(tuned_OI, count)
        found_k = _largest(base_OK[:, base_K], tuned_OK[:, :count]) if base_K.any() else base_OI.new_zeros(count)
        if bool((tuned_K[:count] & (found_k > _SURE)).all()):
            return found_k
    return _largest(_whole(base_OI), _whole(tuned_OI)[:, :count])


def intruders(base_OI: Tensor, tuned_OI: Tensor) -> int:
    """How many of the tuned weight's ten strongest directions are like none of the base's."""
    return int((cosines(base_OI, tuned_OI) < THRESHOLD).sum())


def _largest(base_OK: Tensor, tuned_Ok: Tensor) -> Tensor:
    return (base_OK.mT @ tuned_Ok).abs().amax(0).clamp(max=1.0)


def _whole(weight_OI: Tensor) -> Tensor:
    """All left singular vectors that W has, strongest first: of its Gram matrix, a fifth of the time of an SVD.

    In float64, where squaring the singular values costs none that float32 tells from zero.
    """
    weight_OI = weight_OI.double()
    if weight_OI.shape[0] <= weight_OI.shape[1]:
        return torch.linalg.eigh(weight_OI @ weight_OI.mT)[1].flip(1).float()
    u_OK = weight_OI @ torch.linalg.eigh(weight_OI.mT @ weight_OI)[1].flip(1)
    return torch.nn.functional.normalize(u_OK, dim=0).float()


def _partial(weight_OI: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Strong left singular vectors (O, K) by subspace iteration from a fixed start, and which of them have settled."""
    devices = [weight_OI.device] if weight_OI.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        u_OK, s_K, _ = torch.svd_lowrank(weight_OI, min(count + _MORE, *weight_OI.shape), niter=_ROUNDS)
    residual_K = torch.linalg.vector_norm(weight_OI @ (weight_OI.mT @ u_OK) - u_OK * s_K.square(), dim=0)
    between_K = -s_K.square().diff()
    edge = between_K.new_full((1,), float("inf"))
    gap_K = torch.minimum(torch.cat([edge, between_K]), torch.cat([between_K, edge]))
    return u_OK, residual_K < _SETTLED * gap_K
