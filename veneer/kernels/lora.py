"""LoRA layers as one operation: y = x W' + s (x A') B', over several slots and several layers, forward and backward.

Legend: T tokens, I in, O out, R rank (of several pairs together: their sum).

Why one operation: written as separate ones, autograd makes a pass over x and one over y for every product and sum.
Here both products land in the buffer that the frozen product wrote, and only x and z = x A' are kept for backward.
Layers that are fed the same x (q, k, v; gate, up) share the thin products over x: one for all A, one for all their
gradients, and their gradients for x land in one buffer. `LoRA.delta` is the oracle (tests/kernels/test_lora.py).
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

    def matmul_t(self, g_TO: Tensor, into: Tensor | None = None) -> Tensor: ...


class Piece(NamedTuple):
    """Rows start:stop of x meet the factor pair number `pair`, times `scale`, in layer number `layer`."""

    start: int
    stop: int
    pair: int
    scale: float
    layer: int = 0


def lora_linear(
    x_TI: Tensor, base: Products, pieces: Sequence[Piece], factors: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """x W' + bias + Σ over pieces of scale · (x A') B' on the piece's rows, (T, O) in x's dtype.

    factors: pairs a_RI, b_OR in any float dtype; products run in x's dtype, gradients come back in the factor's.
    Pieces may overlap (their updates add up) and may leave rows out (those get the base alone).
    """
    return lora_linears(x_TI, [base], pieces, factors)[0]


def lora_linears(
    x_TI: Tensor, bases: Sequence[Products], pieces: Sequence[Piece], factors: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    """`lora_linear` for several layers that are fed the same x: an output for each of `bases`."""
    flat = [tensor for pair in factors for tensor in pair]
    device = x_TI.device.type
    if not torch.is_autocast_enabled(device):
        return _LoraLinears.apply(x_TI, tuple(bases), tuple(pieces), *flat)
    # Autocast would pick another dtype for each product; here one dtype is chosen for all, the one it asks for.
    x_TI = x_TI.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _LoraLinears.apply(x_TI, tuple(bases), tuple(pieces), *flat)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, bases: tuple[Products, ...], pieces: tuple[Piece, ...], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        cast = [factor.to(x_TI.dtype) for factor in factors]
        ys = [base.matmul(x_TI) for base in bases]
        for base, y_TO in zip(bases, ys, strict=True):
            if base.bias is not None:
                y_TO += base.bias.to(y_TO.dtype)
        runs, zs = _runs(pieces), []
        for run in runs:
            rows = slice(run[0].start, run[0].stop)
            z_TR = x_TI[rows] @ _stacked(run, cast).t()
            zs.append(z_TR)
            for piece, z in zip(run, _split(z_TR, run, cast, 1), strict=True):
                ys[piece.layer][rows].addmm_(z, cast[2 * piece.pair + 1].t(), alpha=piece.scale)
        ctx.save_for_backward(x_TI, *cast, *zs)
        ctx.bases, ctx.runs, ctx.dtypes = bases, runs, [factor.dtype for factor in factors]
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gs_TO: Tensor | None) -> tuple[Any, ...]:
        x_TI, *rest = ctx.saved_tensors
        cast, zs = rest[: len(ctx.dtypes)], rest[len(ctx.dtypes) :]
        dx_TI = None
        if ctx.needs_input_grad[0]:
            for base, g_TO in zip(ctx.bases, gs_TO, strict=True):
                dx_TI = dx_TI if g_TO is None else base.matmul_t(g_TO, dx_TI)
        grads = _Gradients(ctx.dtypes, ctx.needs_input_grad[3:])
        for run, z_TR in zip(ctx.runs, zs, strict=True):
            rows, parts = slice(run[0].start, run[0].stop), []
            for piece, z in zip(run, _split(z_TR, run, cast, 1), strict=True):
                g_TO = gs_TO[piece.layer]
                if g_TO is None:
                    parts.append(torch.zeros_like(z))
                    continue
                g, b_index = g_TO[rows], 2 * piece.pair + 1
                parts.append((g @ cast[b_index]).mul_(piece.scale))
                if grads.needed[b_index]:
                    # z' g and not g' z: the thin side first is the faster order on CPU.
                    grads.add(b_index, (z.t() @ g).t(), piece.scale)
            dz_TR = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if dx_TI is not None:
                dx_TI[rows].addmm_(dz_TR, _stacked(run, cast))
            if any(grads.needed[2 * piece.pair] for piece in run):
                for piece, da in zip(run, _split(dz_TR.t() @ x_TI[rows], run, cast, 0), strict=True):
                    grads.add(2 * piece.pair, da)
        return dx_TI, None, None, *grads.sums


class _Gradients:
    """Sums of the gradients of the factors, each in its factor's dtype; None where none is needed or came."""

    def __init__(self, dtypes: Sequence[torch.dtype], needed: Sequence[bool]) -> None:
        self.dtypes, self.needed = dtypes, needed
        self.sums: list[Tensor | None] = [None] * len(dtypes)

    def add(self, index: int, value: Tensor, scale: float = 1.0) -> None:
        if not self.needed[index]:
            return
        value = value.to(self.dtypes[index])
        value = value if scale == 1.0 else value * scale
        held = self.sums[index]
        self.sums[index] = value if held is None else held + value


def _runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces of the same rows together, in any layer: they share the products over x."""
    runs: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        runs.setdefault((piece.start, piece.stop), []).append(piece)
    return list(runs.values())


def _stacked(run: Sequence[Piece], cast: Sequence[Tensor]) -> Tensor:
    """The A of every piece, one above the other: (R, I)."""
    return cast[2 * run[0].pair] if len(run) == 1 else torch.cat([cast[2 * piece.pair] for piece in run])


def _split(x: Tensor, run: Sequence[Piece], cast: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """Each piece's part along the stacked ranks."""
    return (x,) if len(run) == 1 else x.split([len(cast[2 * piece.pair]) for piece in run], dim)
