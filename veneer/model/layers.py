"""How a model's decoder layers run while a stream does: compiled, and computed twice where memory asks for it.

The layers' own code stays as it is. What is put on an instance is its `forward`: an object that calls the class's own,
through torch.compile or not, keeping its activations or not. An ordinary `model(...)` call runs the layer as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from veneer.bases.base import Base
from veneer.bases.kept import decoded_once
from veneer.model.gated import is_fused, is_gated
from veneer.model.packed import Wiring, wiring_of
from veneer.model.recompute import Shelf, recomputed
from veneer.model.text import body_of
from veneer.model.tiled import own_forward, plain_mlp, tile, untile
from veneer.model.unread import Trials


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers itself would checkpoint, in order."""
    return [module for module in body_of(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def arrange(
    model: nn.Module,
    compiled: bool = False,
    recompute: int = 0,
    offload: bool = False,
    decoded: bool = False,
    backend: str = "inductor",
    ended: Callable[[nn.Module], None] | None = None,
) -> None:
    """Compiles the layers or not, and computes the first `recompute` of them twice (-1: all); replaces what was set.

    Recomputed layers keep only their input for backward, with `offload` on the host. The first ones, because theirs is
    kept longest. decoded: they decode quantised weights once for the second run and its backward, which takes the
    memory of one layer's. backend: torch.compile's. ended: called with each recomputed layer, once its backward has
    ended and its parameters have their gradients.
    """
    as_they_were(model)
    for base in [module for module in model.modules() if isinstance(module, Base)] if compiled else ():
        base.renew_norms()
    wiring, function = wiring_of(model), torch.compile(_own_forward, backend=backend) if compiled else None
    mlp_function = torch.compile(own_forward, backend=backend) if compiled else own_forward
    layers, fused = decoder_layers(model), compiled and is_fused(next(model.parameters()).device)
    count = len(layers) if recompute < 0 else recompute
    shelf = Shelf(next(model.parameters()).device) if offload else None
    how = Arrangement(wiring, function, shelf, Trials(wiring), decoded, ended)
    for number, layer in enumerate(layers):
        layer.__dict__["forward"] = Run(layer, how, number if number < count else None)
        if (mlp := plain_mlp(layer)) is not None:
            pieces, gated = number < count, fused and is_gated(mlp)
            if pieces or gated:
                tile(mlp, wiring, mlp_function, pieces, gated)


def as_they_were(model: nn.Module) -> None:
    """Undoes `arrange`."""
    for layer in decoder_layers(model):
        layer.__dict__.pop("forward", None)
        if (mlp := plain_mlp(layer)) is not None:
            untile(mlp)


@dataclass(frozen=True)
class Arrangement:
    """What all layers of a model have in common."""

    wiring: Wiring
    compiled: Callable[..., Any] | None  # a layer's forward
    shelf: Shelf | None  # where inputs of recomputed layers are kept; None: on the device
    trials: Trials
    decoded: bool  # quantised weights once for the second run and its backward
    ended: Callable[[nn.Module], None] | None


class Run:
    """What stands for one layer's `forward`."""

    def __init__(self, layer: nn.Module, how: Arrangement, number: int | None) -> None:
        """number: among the layers that are recomputed; None: not one of them."""
        self.layer, self.how, self.number = layer, how, number

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        how, wiring = self.how, self.how.wiring
        forward = how.compiled if how.compiled is not None and wiring.whole is not None else _own_forward
        if wiring.stream is None or not torch.is_grad_enabled():
            return forward(self.layer, hidden, *args, **kwargs)
        if not hidden.requires_grad:
            # The first layer as the others: it needs no compilation of its own, and recomputing works from its input.
            hidden = hidden.detach().requires_grad_()
        if self.number is None:
            return forward(self.layer, hidden, *args, **kwargs)

        def run(x: Tensor) -> Tensor:
            return forward(self.layer, x, *args, **kwargs)

        unread = how.trials.unread(self.layer, hidden, run)

        def again(x: Tensor) -> Tensor:
            with wiring.leaving_out(unread):
                return run(x)

        @contextmanager
        def around() -> Iterator[None]:
            with decoded_once(self.layer) if how.decoded else nullcontext():
                yield
            if how.ended is not None:
                how.ended(self.layer)

        return recomputed(hidden, run, again, around, how.shelf, self.number)


def _own_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's forward, with the layer as an argument: one compilation serves all layers, and a copied model's
    layers never meet another's weights."""
    return type(layer).forward(layer, *args, **kwargs)
