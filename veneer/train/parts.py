"""An adapter in parts, one a decoder layer: each is updated as its layer's backward ends, and its gradients are freed.

Legend: P parameters of the adapter.

So no more than one layer's gradients are held, where all together take 4 bytes a trained parameter. What cannot be had
with it is what needs them all at once: their norm before the update, and several passes to a step.
Source: Lv et al. 2023, arXiv 2306.09782; the option's name is torchtune's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.errors import TrainingError
from veneer.methods.base import Method
from veneer.train.optim import FlatParameters, by_family, step_where

_LAYER = re.compile(r"^.*?\.\d+(?=\.)")


def by_layer(methods: Mapping[str, Method]) -> list[list[nn.Parameter]]:
    """The parameters of methods (by path), those of each decoder layer together: in it as `by_family` has them."""
    layers: dict[str, dict[str, Method]] = {}
    for path, method in methods.items():
        found = _LAYER.match(path)
        layers.setdefault(found.group() if found else "", {})[path] = method
    return [by_family(members) for members in layers.values()]


class Part:
    """Neighbours in the flat tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter], values: nn.Parameter) -> None:
        self.parameters, self.values = parameters, values  # what autograd and what the optimiser sees of it
        self.norm: Tensor | None = None  # of this step's gradient, once the part is updated

    def step(self, optimizer: Optimizer, finite: Tensor) -> Tensor:
        """Updates where `finite` and the gradients are; returns whether both are."""
        held = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.values.grad = torch.cat([grad.reshape(-1) for grad in held])
        del held
        self.clear()
        self.norm = torch.linalg.vector_norm(self.values.grad)
        finite = finite & torch.isfinite(self.norm)
        step_where(optimizer, finite)
        self.values.grad = None
        return finite

    def check_once(self) -> None:
        """Raises TrainingError where this step has updated the part already."""
        if self.norm is not None:
            raise TrainingError(
                "a layer's backward ended twice in a step (layers that share weights?), and --optimizer-in-bwd had "
                "used its gradients when more came; next: leave it out"
            )

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class PartedParameters(FlatParameters):
    """Flat parameters whose gradients live from backward to the update of their part."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        super().__init__([parameter for group in groups for parameter in group])
        pieces = self.values_P.data.split([sum(parameter.numel() for parameter in group) for group in groups])
        self.parts = [Part(group, nn.Parameter(piece)) for group, piece in zip(groups, pieces, strict=True)]
        self.part_of = {id(parameter): part for part in self.parts for parameter in part.parameters}

    @property
    def optimised(self) -> list[nn.Parameter]:
        return [part.values for part in self.parts]

    def hold_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Autograd's own are enough."""

    def begin(self) -> None:
        """Before a step's forward pass: nothing is left of one that was given up."""
        for part in self.parts:
            part.norm = None
            part.clear()

    def step_layer(self, layer: nn.Module, optimizer: Optimizer, finite: Tensor) -> Tensor:
        """Updates what is trained in `layer`, whose backward has ended; `finite` as of `Part.step`.

        Raises TrainingError where its part was updated before: gradients have come that were too late.
        """
        for part in {id(part): part for p in layer.parameters() if (part := self.part_of.get(id(p)))}.values():
            part.check_once()
            finite = part.step(optimizer, finite)
        return finite

    def step(self, optimizer: Optimizer, finite: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
        """What no layer's end has updated; nothing is clipped. Raises as `step_layer`."""
        for part in self.parts:
            if part.norm is None:
                finite = part.step(optimizer, finite)
            elif any(parameter.grad is not None for parameter in part.parameters):
                part.check_once()
        norms = torch.stack([part.norm for part in self.parts if part.norm is not None])
        for part in self.parts:
            part.norm = None
        return torch.linalg.vector_norm(norms), finite

    def clear(self) -> None:
        for part in self.parts:
            part.clear()
