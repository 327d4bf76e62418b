"""The product that the second run of a recomputed layer leaves out, because no gradient reads it.

Legend: T tokens, I in, O out.

Most layers end with x + product, and no gradient asks for that product's value: a quarter of the work of a Llama layer.
Which leaf that is, if any, is tried out: with other values in the product's place the layer's gradients must be what
they are. NaN alone would not do: a ReLU's gradient asks whether its input is above zero, and NaN is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.bases.base import Base

if TYPE_CHECKING:
    from veneer.model.leaf import Leaf
    from veneer.model.packed import Wiring

# Of a gradient's norm: kernels that sum in any order. A product that is read changes it by all of it.
CLOSE = 1e-2
VALUES = (math.nan, 100.0, -100.0)  # above and below where functions bend
OWN = ("layer_idx", "path", "training")  # of every layer its own, or of no matter here
Kind = tuple


class Unread:
    """Stands for a base: one value for all of x W', which takes no product; everything else is the base's own."""

    def __init__(self, base: Base, value: float = math.nan) -> None:
        self.base, self.bias, self.value = base, base.bias, value

    @property
    def adds(self) -> bool:
        return self.base.adds

    def matmul(self, x_TI: Tensor, into: Tensor | None = None) -> Tensor:
        if into is not None:
            return into.fill_(self.value)
        return x_TI.new_full((len(x_TI), self.base.out_features), self.value)

    def matmul_t(self, g_TO: Tensor, into: Tensor | None = None) -> Tensor:
        return self.base.matmul_t(g_TO, into)


class Trials:
    """What has been found out, once for every kind of layer (`_kind`)."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.known: dict[Kind, str | None] = {}

    def unread(self, layer: nn.Module, hidden: Tensor, run: Callable[[Tensor], Tensor]) -> Leaf | None:
        """The leaf of `layer` whose product may be left out when `run` runs again; None: there is none."""
        if any(module._forward_hooks for module in layer.modules() if module is not layer):
            return None  # a user's: it is to see what is computed
        kind = _kind(layer)
        if kind not in self.known:
            self.known[kind] = self._tried(layer, hidden, run)
        name = self.known[kind]
        return None if name is None else layer.get_submodule(name)

    def _tried(self, layer: nn.Module, hidden: Tensor, run: Callable[[Tensor], Tensor]) -> str | None:
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

        def gradients(leaf: Leaf | None, value: float = math.nan) -> list[Tensor | None]:
            with _gradients_apart(trained), torch.enable_grad():
                x = hidden.detach().requires_grad_()
                with self.wiring.leaving_out(leaf, value):
                    out = run(x)
                # Not ones: the sum of what a norm gives, say, has no gradient at all.
                seed = torch.arange(out.numel(), dtype=torch.float32, device=out.device).sin_()
                torch.autograd.backward(out, seed.view_as(out).to(out.dtype))
                return [x.grad, *(parameter.grad for parameter in trained)]

        self.wiring.latest = None
        wanted = gradients(None)
        last = self.wiring.latest
        name = next((name for name, module in layer.named_modules() if module is last), None)
        if last is None or name is None:
            return None
        unread = all(all(map(_same, gradients(last, value), wanted)) for value in VALUES)
        return name if unread else None


def _kind(layer: nn.Module) -> Kind:
    """All that tells layers apart in what they compute: modules, their slots and settings, what is trained."""
    return tuple(
        (name, type(module), *getattr(module, "slots", ()), *_settings(module))
        for name, module in layer.named_modules()
    ) + tuple(parameter.requires_grad for parameter in layer.parameters())


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    plain = (bool, int, float, str, type(None))
    return [(name, value) for name, value in vars(module).items() if type(value) in plain and name not in OWN]


def _same(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return bool((found - wanted).float().norm() <= CLOSE * wanted.float().norm())  # not where there is a NaN


@contextmanager
def _gradients_apart(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """While inside, the parameters' gradients begin anew; after, they are what they were, in the same memory."""
    held = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, held, strict=True):
            parameter.grad = grad
