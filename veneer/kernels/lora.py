"""LoRA layers as one operation: y = x W' + s (x A') B', over several slots and several layers, forward and backward.

Legend: T tokens, I in, O out, R rank (of several pairs together: their sum).

Why one operation: written as separate ones, autograd makes a pass over x and one over y for every product and sum.
Here both products land in the buffer that the frozen product wrote, and only x and z = s x A' are kept for backward.
Layers that are fed the same x (q, k, v; gate, up) share the thin products over x: one for all A, one for all their
gradients, and their gradients for x land in one buffer. `LoRA.delta` is the oracle (tests/kernels/test_lora.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from veneer.kernels.thin import summed_product, thin_gradients


class Products(Protocol):
    """What is needed of a frozen weight W (O, I): see veneer.bases.base.Base."""

    bias: Tensor | None

    @property
    def adds(self) -> bool: ...

    def matmul(self, x_TI: Tensor, into: Tensor | None = None) -> Tensor: ...

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
        ys, zs = products(x_TI, bases, pieces, factors)
        ctx.save_for_backward(x_TI, *factors, *zs)
        ctx.bases, ctx.pieces = bases, pieces
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gs_TO: Tensor | None) -> tuple[Any, ...]:
        needed_x, _, _, *needed = ctx.needs_input_grad
        x_TI, *rest = ctx.saved_tensors
        factors, zs = rest[: len(needed)], rest[len(needed) :]
        dx_TI, sums = gradients(gs_TO, x_TI, zs, ctx.bases, ctx.pieces, factors, needed_x, needed)
        return dx_TI, None, None, *sums


def products(
    x_TI: Tensor, bases: Sequence[Products], pieces: Sequence[Piece], factors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs (T, O) of every layer, and z = s x A' of every run of pieces; nothing is recorded for autograd."""
    cast, runs = Cast(factors, x_TI.dtype), _runs(pieces)
    zs = [cast.scaled(x_TI[run[0].start : run[0].stop] @ cast.stacked(run).t(), run) for run in runs]
    parts = [part for run, z in zip(runs, zs, strict=True) for part in zip(run, cast.split(z, run, 1), strict=True)]
    intos: list[Tensor | None] = [None] * len(bases)
    later = []
    for piece, z in parts:
        if intos[piece.layer] is None and _thin_first(x_TI, [piece], [bases[piece.layer]]):
            intos[piece.layer] = z @ cast.b[piece.pair].t()
        else:
            later.append((piece, z))
    ys = matmuls(bases, x_TI, intos)
    for piece, z in later:
        ys[piece.layer][piece.start : piece.stop].addmm_(z, cast.b[piece.pair].t())
    for base, y_TO in zip(bases, ys, strict=True):
        if base.bias is not None:
            y_TO += base.bias.to(y_TO.dtype)
    return ys, zs


def matmuls(bases: Sequence[Products], x_TI: Tensor, intos: Sequence[Tensor | None]) -> list[Tensor]:
    """x W' of every base, added to what is given for it; a storage may share what it makes of x among its own."""
    kind: Any = type(bases[0])  # a member of BASES, where there are several: see veneer.bases.base
    if len(bases) > 1 and all(type(base) is kind for base in bases):
        return kind.matmuls(bases, x_TI, intos)
    return [base.matmul(x_TI, into) for base, into in zip(bases, intos, strict=True)]


def gradients(
    gs_TO: Sequence[Tensor | None],
    x_TI: Tensor,
    zs: Sequence[Tensor],
    bases: Sequence[Products],
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
    needed_x: bool,
    needed: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Of the outputs' gradients: those of x and of every factor, where needed."""
    cast = Cast(factors, x_TI.dtype)
    grads, runs = _Gradients([factor.dtype for factor in factors], needed), _runs(pieces)
    dzs = [_through_b(run, gs_TO, z_TR, cast, grads) for run, z_TR in zip(runs, zs, strict=True)]
    for run, dz_TR in zip(runs, dzs, strict=True):
        if any(needed[2 * piece.pair] for piece in run):
            rows = slice(run[0].start, run[0].stop)
            da_RI = summed_product(dz_TR, x_TI[rows], factors[2 * run[0].pair].dtype)
            for piece, da in zip(run, cast.split(da_RI, run, 0), strict=True):
                grads.add(2 * piece.pair, da)
    return (through_x(gs_TO, x_TI, dzs, bases, runs, cast) if needed_x else None), grads.sums


def _through_b(
    run: Sequence[Piece], gs_TO: Sequence[Tensor | None], z_TR: Tensor, cast: Cast, grads: _Gradients
) -> Tensor:
    """The gradient of a run's x A' (T, R); those of its B are added to `grads`."""
    rows, parts = slice(run[0].start, run[0].stop), []
    for piece, z in zip(run, cast.split(z_TR, run, 1), strict=True):
        g_TO, b_index = gs_TO[piece.layer], 2 * piece.pair + 1
        if g_TO is None:
            parts.append(torch.zeros_like(z))
            continue
        g = g_TO[rows]
        if not grads.needed[b_index]:
            parts.append(g @ cast.b[piece.pair])
            continue
        dz, db_OR = thin_gradients(g, z, cast.b[piece.pair], grads.dtypes[b_index])
        parts.append(dz)
        grads.add(b_index, db_OR)
    return cast.scaled(parts[0] if len(parts) == 1 else torch.cat(parts, 1), run)


def through_x(
    gs_TO: Sequence[Tensor | None],
    x_TI: Tensor,
    dzs: Sequence[Tensor],
    bases: Sequence[Products],
    runs: Sequence[list[Piece]],
    cast: Cast,
) -> Tensor | None:
    """The gradient of x: of all layers and runs in one buffer."""
    first = 1 if runs and _thin_first(x_TI, runs[0], bases) else 0
    dx_TI = dzs[0] @ cast.stacked(runs[0]) if first else None
    for base, g_TO in zip(bases, gs_TO, strict=True):
        dx_TI = dx_TI if g_TO is None else base.matmul_t(g_TO, dx_TI)
    if dx_TI is not None:
        for run, dz_TR in zip(runs[first:], dzs[first:], strict=True):
            dx_TI[run[0].start : run[0].stop].addmm_(dz_TR, cast.stacked(run))
    return dx_TI


def _thin_first(x_TI: Tensor, run: Sequence[Piece], bases: Sequence[Products]) -> bool:
    """Whether a run's thin product is written before the base's product is added to it.

    On a GPU the large product adds to memory while it computes, which spares a pass over the output; on the CPU the
    thin product added last is the faster order.
    """
    whole = (run[0].start, run[0].stop) == (0, len(x_TI))
    return x_TI.is_cuda and whole and all(base.adds for base in bases)


class _Gradients:
    """Sums of the gradients of the factors, each in its factor's dtype; None where none is needed or came."""

    def __init__(self, dtypes: Sequence[torch.dtype], needed: Sequence[bool]) -> None:
        self.dtypes, self.needed = dtypes, needed
        self.sums: list[Tensor | None] = [None] * len(dtypes)

    def add(self, index: int, value: Tensor) -> None:
        if not self.needed[index]:
            return
        value = value.to(self.dtypes[index])
        held = self.sums[index]
        self.sums[index] = value if held is None else held + value


def _runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces of the same rows together, in any layer: they share the products over x."""
    runs: dict[tuple[int, int], list[Piece]] = {}
    for piece in pieces:
        runs.setdefault((piece.start, piece.stop), []).append(piece)
    return list(runs.values())


class Cast:
    """The factors in the activations' dtype. Where they are neighbours in memory, every A before every B, one launch
    casts all, and every A is one matrix already."""

    def __init__(self, factors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.a, self.b = list(factors[0::2]), list(factors[1::2])
        self.block_RI: Tensor | None = None  # every A, one above the other
        block = _contiguous_block([*self.a, *self.b])
        if block is None:
            self.a, self.b = ([factor.to(dtype) for factor in side] for side in (self.a, self.b))
            return
        if block.dtype != dtype:
            block = block.to(dtype)
            parts = iter(block.split([factor.numel() for factor in (*self.a, *self.b)]))
            self.a, self.b = ([next(parts).view(old.shape) for old in side] for side in (self.a, self.b))
        self.block_RI = block[: sum(map(torch.numel, self.a))].view(-1, self.a[0].shape[1])

    def stacked(self, run: Sequence[Piece]) -> Tensor:
        """The A of every piece of a run, one above the other: (R, I)."""
        if len(run) == 1:
            return self.a[run[0].pair]
        if self.block_RI is not None and [piece.pair for piece in run] == list(range(len(self.a))):
            return self.block_RI
        return torch.cat([self.a[piece.pair] for piece in run])

    def scaled(self, z_TR: Tensor, run: Sequence[Piece]) -> Tensor:
        """Each piece's part times its scale, in place: once for all that is made of z."""
        scale = run[0].scale
        if any(piece.scale != scale for piece in run):
            for piece, z in zip(run, self.split(z_TR, run, 1), strict=True):
                z.mul_(piece.scale)
            return z_TR
        return z_TR if scale == 1.0 else z_TR.mul_(scale)

    def split(self, x: Tensor, run: Sequence[Piece], dim: int) -> Sequence[Tensor]:
        """Each piece's part along the stacked ranks."""
        return (x,) if len(run) == 1 else x.split([len(self.a[piece.pair]) for piece in run], dim)


def _contiguous_block(factors: Sequence[Tensor]) -> Tensor | None:
    """Their memory as one tensor, where each begins where the one before ends and the first half is equally wide."""
    if not factors or torch.compiler.is_compiling():  # where memory lies cannot be traced
        return None
    first = factors[0]
    width, dtype, memory = first.shape[1], first.dtype, first.untyped_storage().data_ptr()
    begin = place = first.storage_offset()
    for number, factor in enumerate(factors):
        if factor.storage_offset() != place or factor.dtype != dtype or not factor.is_contiguous():
            return None
        if factor.untyped_storage().data_ptr() != memory or (2 * number < len(factors) and factor.shape[1] != width):
            return None
        place += factor.numel()
    return first.as_strided((place - begin,), (1,))
