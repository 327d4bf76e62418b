"""The LoRA layer as one operation: y = x W' + s (x A') B', over several slots, forward and backward.

Legend: T tokens, I in, O out, R rank.

Why one operation: written as separate ones, autograd makes a pass over x and one over y for every product and sum.
Here both products land in the buffer that the frozen product wrote, and only x and z = x A' are kept for backward.
`LoRA.delta` is the oracle (tests/kernels/test_lora.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Products(Protocol):
    """What is needed of a frozen weight W (O, I): see veneer.bases.base.Base."""

    bias: Tensor | None

    def matmul(self, x_TI: Tensor) -> Tensor: ...

    def matmul_t(self, g_TO: Tensor) -> Tensor: ...


class Piece(NamedTuple):
    """Rows start:stop of x meet the factor pair number `pair`, times `scale`."""

    start: int
    stop: int
    pair: int
    scale: float


def lora_linear(
    x_TI: Tensor, base: Products, pieces: Sequence[Piece], factors: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """x W' + bias + Σ over pieces of scale · (x A') B' on the piece's rows, (T, O) in x's dtype.

    factors: pairs a_RI, b_OR in any float dtype; products run in x's dtype, gradients come back in the factor's.
    Pieces may overlap (their updates add up) and may leave rows out (those get the base alone).
    """
    flat = [tensor for pair in factors for tensor in pair]
    device = x_TI.device.type
    if not torch.is_autocast_enabled(device):
        return _LoraLinear.apply(x_TI, base, tuple(pieces), *flat)
    # Autocast would pick another dtype for each product; here one dtype is chosen for all, the one it asks for.
    x_TI = x_TI.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _LoraLinear.apply(x_TI, base, tuple(pieces), *flat)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, base: Products, pieces: tuple[Piece, ...], *factors: Tensor) -> Tensor:
        cast = [factor.to(x_TI.dtype) for factor in factors]
        y_TO = base.matmul(x_TI)
        if base.bias is not None:
            y_TO += base.bias.to(y_TO.dtype)
        zs = []
        for start, stop, pair, scale in pieces:
            z_TR = x_TI[start:stop] @ cast[2 * pair].t()
            y_TO[start:stop].addmm_(z_TR, cast[2 * pair + 1].t(), alpha=scale)
            zs.append(z_TR)
        ctx.save_for_backward(x_TI, *cast, *zs)
        ctx.base, ctx.pieces, ctx.dtypes = base, pieces, [factor.dtype for factor in factors]
        return y_TO

    @staticmethod
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Any, ...]:
        x_TI, *rest = ctx.saved_tensors
        cast, zs = rest[: len(ctx.dtypes)], rest[len(ctx.dtypes) :]
        dx_TI = ctx.base.matmul_t(g_TO) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = [None] * len(cast)
        for (start, stop, pair, scale), z_TR in zip(ctx.pieces, zs, strict=True):
            g, a_RI, b_OR = g_TO[start:stop], cast[2 * pair], cast[2 * pair + 1]
            dz_TR = (g @ b_OR).mul_(scale)
            if dx_TI is not None:
                dx_TI[start:stop].addmm_(dz_TR, a_RI)
            if ctx.needs_input_grad[3 + 2 * pair]:
                _add(grads, 2 * pair, dz_TR.t() @ x_TI[start:stop], ctx.dtypes, 1.0)
            if ctx.needs_input_grad[4 + 2 * pair]:
                # z' g and not g' z: the thin side first is the faster order on CPU.
                _add(grads, 2 * pair + 1, (z_TR.t() @ g).t(), ctx.dtypes, scale)
        return dx_TI, None, None, *grads


def _add(grads: list[Tensor | None], index: int, value: Tensor, dtypes: list[torch.dtype], scale: float) -> None:
    value = value.to(dtypes[index])
    value = value if scale == 1.0 else value * scale
    held = grads[index]
    grads[index] = value if held is None else held + value
