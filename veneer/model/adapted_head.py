"""The loss through a vocabulary head that is adapted: in chunks, with gradients for what is trained there.

Legend: M targets, D hidden size, V vocabulary.

A frozen head makes the gradient of its input while a chunk's logits exist (`veneer.model.losses`). What is trained in a
head needs each row's weight in the loss first, which only backward knows; so logits are made again there, chunk by
chunk, and no more of them exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.cross_entropy import cross_entropy_
from veneer.model.head import Head
from veneer.model.vocabulary import HeadLeaf


def adapted_nll(hidden_MD: Tensor, head: Head, tokens_M: Tensor, rows_M: Tensor | None, chunk: int) -> Tensor:
    """-log softmax(head(hidden))[token], (M) in float32, through a head with slots.

    rows_M: where in the running stream the hidden states stand. Gradients: for `hidden` and for what is trained.
    """
    assert isinstance(head.linear, HeadLeaf)
    methods = {id(method): method for _, method in head.linear.speakers()}
    trained = [p for method in methods.values() for p in method.parameters() if p.requires_grad]
    return _AdaptedNLL.apply(hidden_MD, head, tokens_M, rows_M, chunk, *trained)


class _AdaptedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, head: Head, tokens_M: Tensor, rows_M: Tensor | None, chunk: int, *trained: Tensor
    ) -> Tensor:
        nll_M = torch.empty(len(hidden_MD), dtype=torch.float32, device=hidden_MD.device)
        for rows in _chunks(len(hidden_MD), chunk):
            logits_MV = head.logits(hidden_MD[rows], None if rows_M is None else rows_M[rows])
            nll_M[rows] = cross_entropy_(logits_MV, tokens_M[rows], False)
        ctx.save_for_backward(hidden_MD, tokens_M, rows_M, *trained)
        ctx.head, ctx.chunk, ctx.stream = head, chunk, head.linear.wiring.stream
        return nll_M

    @staticmethod
    def backward(ctx: Any, g_M: Tensor) -> tuple[Any, ...]:
        hidden_MD, tokens_M, rows_M, *trained = ctx.saved_tensors
        if ctx.head.linear.wiring.stream is not ctx.stream:
            raise RuntimeError("backward through an adapted head after its stream has ended; run it inside `running`")
        grad_MD = torch.zeros_like(hidden_MD)
        sums = [torch.zeros_like(parameter) for parameter in trained]
        for rows in _chunks(len(hidden_MD), ctx.chunk):
            with torch.enable_grad():
                x_MD = hidden_MD[rows].detach().requires_grad_()
                logits_MV = ctx.head.logits(x_MD, None if rows_M is None else rows_M[rows])
            g_MV = logits_MV.detach().clone()
            cross_entropy_(g_MV, tokens_M[rows], True)
            g_MV *= g_M[rows, None].to(g_MV.dtype)
            grad_MD[rows], *grads = torch.autograd.grad(logits_MV, [x_MD, *trained], g_MV)
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        return grad_MD, None, None, None, None, *sums


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, rows, chunk))
