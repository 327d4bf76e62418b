"""-log softmax of one token a row, and its gradient for the logits in the logits' own memory.

Legend: M rows, V vocabulary. The Triton version is in `veneer.kernels.cross_entropy_triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.triton_here import has_triton

BLOCK = 16  # rows that a core's cache holds in float32


def cross_entropy_(logits_MV: Tensor, tokens_M: Tensor, wanted: bool) -> Tensor:
    """-log softmax(logits)[token], (M) in float32; where wanted, the logits become their own gradients, in place.

    tokens_M: int64 in [0, V). Sums run in float32; the gradient, softmax - onehot, is rounded once to logits' dtype.
    """
    if logits_MV.is_cuda and has_triton():
        from veneer.kernels.cross_entropy_triton import cross_entropy_ as triton_version

        return triton_version(logits_MV, tokens_M, wanted)
    return cross_entropy_reference_(logits_MV, tokens_M, wanted)


def cross_entropy_reference_(logits_MV: Tensor, tokens_M: Tensor, wanted: bool) -> Tensor:
    """The same in torch, a block of rows at a time."""
    nll_M = torch.empty(len(logits_MV), dtype=torch.float32, device=logits_MV.device)
    for logits, tokens, nll in zip(logits_MV.split(BLOCK), tokens_M.split(BLOCK), nll_M.split(BLOCK), strict=True):
        log_probs = logits.float().log_softmax(-1)
        nll.copy_(log_probs.gather(1, tokens[:, None]).squeeze(1).neg_())
        if not wanted:
            continue
        probs = log_probs.exp_()
        probs.scatter_add_(1, tokens[:, None], torch.full_like(probs[:, :1], -1.0))
        logits.copy_(probs)
    return nll_M
