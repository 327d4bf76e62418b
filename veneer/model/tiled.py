"""The MLP of a recomputed layer, a piece of the tokens at a time: most of what a layer holds in backward is the MLP's.

Legend: T tokens, D hidden size.

Every token passes the MLP on its own, so pieces give the same. In the second run of the layer nothing is computed here
at all where no gradient reads what the MLP gives (`veneer.model.unread`): backward runs each piece forward and back,
and lets go of it before the next. The same work as without pieces. Source: Bekman et al. 2025, arXiv 2506.13996.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.model.gated import gated_or_own
from veneer.model.leaf import Leaf
from veneer.model.packed import Wiring

TILE = 4096  # tokens of a piece: products of fewer rows are slower
NAMES = ("mlp", "feed_forward")
STATE = "veneer_tiled"
Own = Callable[[nn.Module, Tensor], Tensor]


def plain_mlp(layer: nn.Module) -> nn.Module | None:
    """The layer's MLP, where it consists of linear layers and functions alone; experts, say, are left as they are, and
    so is one with a `forward` that someone else has put on it."""
    for name in NAMES:
        mlp = getattr(layer, name, None)
        others = "forward" in getattr(mlp, "__dict__", {}) and STATE not in mlp.__dict__
        if isinstance(mlp, nn.Module) and not others and not list(mlp.parameters(recurse=False)):
            children = list(mlp.children())
            if all(isinstance(child, (Leaf, nn.Linear)) or not list(child.parameters()) for child in children):
                return mlp
    return None


class State(NamedTuple):
    """What is known of an MLP."""

    wiring: Wiring
    own: Own  # its forward, compiled or not
    pieces: bool  # whether it runs in pieces
    gated: bool  # see `veneer.model.gated`


def tile(mlp: nn.Module, wiring: Wiring, own: Own, pieces: bool, gated: bool) -> None:
    """From now `mlp` runs as asked; own: `own_forward`, compiled or not."""
    mlp.__dict__[STATE] = State(wiring, own, pieces, gated)
    # A method of one function, not an object with a state: by that, each layer would be compiled anew.
    mlp.__dict__["forward"] = MethodType(_forward, mlp)


def untile(mlp: nn.Module) -> None:
    """Undoes `tile`."""
    for name in ("forward", STATE):
        mlp.__dict__.pop(name, None)


def own_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """The forward of one piece; a function of its own, as of layers in `veneer.model.layers`, so that compilations of
    one are none of the other's."""
    state: State = getattr(mlp, STATE)
    return gated_or_own(mlp, state.wiring.whole, x) if state.gated else type(mlp).forward(mlp, x)


def _forward(mlp: nn.Module, x: Tensor) -> Tensor:
    if not getattr(mlp, STATE).pieces or x.dim() != 3 or x.shape[0] != 1 or x.shape[1] <= TILE:
        return own_forward(mlp, x)
    return _in_pieces(mlp, x)


@torch.compiler.disable
def _in_pieces(mlp: nn.Module, x: Tensor) -> Tensor:
    wiring, own, *_ = getattr(mlp, STATE)
    if wiring.stream is None or wiring.stream.dropout_keys or not torch.is_grad_enabled():
        return type(mlp).forward(mlp, x)
    return _Pieces.apply(x, mlp, wiring, own)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: nn.Module, wiring: Wiring, own: Own) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mlp, ctx.wiring, ctx.own, ctx.unread = mlp, wiring, own, (wiring.unread, wiring.unread_value)
        if wiring.unread is not None and wiring.unread in set(mlp.modules()):
            return torch.full_like(x, wiring.unread_value)
        out = torch.empty_like(x)
        for rows in _pieces(x):
            with wiring.seeing(rows):
                _part(out, rows).copy_(own(mlp, _part(x, rows)))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        for rows in _pieces(x):
            piece = _part(x, rows).detach().requires_grad_()
            with torch.enable_grad(), ctx.wiring.seeing(rows), ctx.wiring.leaving_out(*ctx.unread):
                out = ctx.own(ctx.mlp, piece)
            torch.autograd.backward(out, _part(g, rows))
            _part(dx, rows).copy_(piece.grad)
        return dx, None, None, None


def _pieces(x: Tensor) -> list[slice]:
    tokens = x.shape[1]
    return [slice(start, min(start + TILE, tokens)) for start in range(0, tokens, TILE)]


def _part(x: Tensor, rows: slice) -> Tensor:
    """Those rows of (1, T, D), as they are: (1, rows, D)."""
    return x[:, rows]
