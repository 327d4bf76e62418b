"""`cross_entropy_` as one kernel: a program a row, the row read twice (the second time from cache) and written once.

Legend: M rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits that a program holds at a time


def cross_entropy_(logits_MV: Tensor, tokens_M: Tensor, wanted: bool) -> Tensor:
    """-log softmax(logits)[token], (M) in float32; where wanted, the logits become their own gradients, in place."""
    rows, vocabulary = logits_MV.shape
    nll_M = torch.empty(rows, dtype=torch.float32, device=logits_MV.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(vocabulary))
        sizes = {"WANTED": wanted, "TIMES": triton.cdiv(vocabulary, block), "BLOCK": block}
        _rows[(rows,)](logits_MV, logits_MV.stride(0), tokens_M, nll_M, vocabulary, **sizes, num_warps=16)
    return nll_M


@triton.jit
def _rows(logits, stride, tokens, nll, vocabulary, WANTED: tl.constexpr, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    token = tl.load(tokens + row)
    columns = tl.arange(0, BLOCK)
    # The largest logit so far, and the sum of exp(logit - largest), for every place of a block on its own.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(TIMES):
        here = step * BLOCK + columns
        x = tl.load(logits + here, mask=here < vocabulary, other=float("-inf")).to(tl.float32)
        more = tl.maximum(largest, x)
        # A place that has seen nothing but -inf keeps a sum of zero: -inf - -inf would be NaN.
        base = tl.where(more == float("-inf"), 0.0, more)
        total = total * tl.exp(largest - base) + tl.exp(x - base)
        largest = more
    peak = tl.max(largest)
    logsumexp = peak + tl.log(tl.sum(total * tl.exp(largest - peak)))
    at_token = tl.load(logits + token).to(tl.float32)
    tl.store(nll + row, logsumexp - at_token)
    if WANTED:
        tl.debug_barrier()  # every thread has read its logits, the token's too, before any is overwritten
        for step in range(TIMES):
            here = step * BLOCK + columns
            x = tl.load(logits + here, mask=here < vocabulary, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - logsumexp) - tl.where(here == token, 1.0, 0.0)
            tl.store(logits + here, gradient.to(logits.dtype.element_ty), mask=here < vocabulary)
