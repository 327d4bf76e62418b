"""How a model's decoder layers run while a stream does: compiled, and computed twice where memory asks for it.

The layers' own code stays as it is. What is put on an instance is its `forward`: an object that calls the class's own,
through torch.compile or not, keeping its activations or not. An ordinary `model(...)` call runs the layer as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from veneer.model.packed import Wiring, wiring_of


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers itself would checkpoint, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def arrange(model: nn.Module, compiled: bool = False, recomputed: int = 0) -> None:
    """Compiles the layers or not, and computes the first `recomputed` of them twice (-1: all); replaces what was set.

    Recomputed layers keep only their input for backward. The first ones, because theirs is kept longest.
    """
    wiring, function = wiring_of(model), torch.compile(_own_forward) if compiled else None
    layers = decoder_layers(model)
    count = len(layers) if recomputed < 0 else recomputed
    for number, layer in enumerate(layers):
        layer.__dict__["forward"] = Run(layer, wiring, function, number < count)


def as_they_were(model: nn.Module) -> None:
    """Undoes `arrange`."""
    for layer in decoder_layers(model):
        layer.__dict__.pop("forward", None)


class Run:
    """What stands for one layer's `forward`."""

    def __init__(self, layer: nn.Module, wiring: Wiring, compiled: Callable[..., Any] | None, recomputed: bool) -> None:
        self.layer, self.wiring, self.compiled, self.recomputed = layer, wiring, compiled, recomputed

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        wiring = self.wiring
        forward = self.compiled if self.compiled is not None and wiring.whole is not None else _own_forward
        if wiring.stream is None or not torch.is_grad_enabled():
            return forward(self.layer, hidden, *args, **kwargs)
        if not hidden.requires_grad:
            # The first layer as the others: it needs no compilation of its own, and recomputing works from its input.
            hidden = hidden.detach().requires_grad_()
        if not self.recomputed:
            return forward(self.layer, hidden, *args, **kwargs)
        return _Recompute.apply(hidden, lambda x: forward(self.layer, x, *args, **kwargs))


def _own_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The class's forward, with the layer as an argument: one compilation serves all layers, and a copied model's
    layers never meet another's weights."""
    return type(layer).forward(layer, *args, **kwargs)


class _Recompute(torch.autograd.Function):
    """Keeps the input alone and runs the layer again in backward (Chen et al. 2016, arXiv 1604.06174).

    Nothing in a layer is random while a stream runs (dropout masks are functions of step and row), so the second run
    computes what the first did. Gradients of adapters are added where they live, by the inner backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.run = run
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(hidden)
        torch.autograd.backward(out, g)
        return hidden.grad, None
