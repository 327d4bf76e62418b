"""What linear layers are fed while rows run through the model's body: told to listeners, kept nowhere.

Legend: T tokens, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.model.leaf import Leaf
from veneer.model.losses import STREAM, streams_of
from veneer.model.packed import hidden_states, running
from veneer.model.stream import pack

Listener = Callable[[Tensor], object]  # called with x (T, I) of every stream, on the model's device, in its dtype


def linear_layers(model: nn.Module) -> dict[str, Leaf]:
    """Path -> a layer that can be listened to; embeddings, heads and stacked experts are fed otherwise."""
    return {module.path: module for module in model.modules() if type(module) is Leaf}


@torch.no_grad()
def hear(
    model: nn.Module,
    listeners: Mapping[str, Listener],
    slot: str | None,
    examples: Sequence[Any],
    max_tokens: int = STREAM,
) -> int:
    """Runs the rows, packed, while `slot` speaks (None: the base alone); how many tokens they have.

    listeners: by the path of a linear layer. examples: objects with `input_ids`, all of whose tokens are run. A layer
    that the body does not come by, or an expert that no token is sent to, is not heard.
    """
    device = next(model.parameters()).device
    with _heard(linear_layers(model), listeners):
        for group in streams_of(examples, max_tokens):
            stream = pack([one.input_ids for one in group], [slot] * len(group), device)
            with running(model, stream):
                hidden_states(model)
    return sum(len(one.input_ids) for one in examples)


@contextmanager
def _heard(layers: Mapping[str, Leaf], listeners: Mapping[str, Listener]) -> Iterator[None]:
    hooks = [layers[path].register_forward_pre_hook(_telling(listeners[path])) for path in listeners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _telling(listener: Listener) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def tell(_layer: nn.Module, fed: tuple[Tensor, ...]) -> None:
        listener(fed[0].flatten(0, -2))

    return tell
