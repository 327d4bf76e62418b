"""Adapters on experts: what a module of experts computes once any of its parameters holds one.

Legend: T tokens, K experts a token, S = T·K rows in the order of their experts, E experts, I in, O out, D hidden size.

The module keeps its parameters, under their names; beside them stands an `ExpertLeaf` for each that holds adapters, and
an own `forward`. It follows what transformers' `use_experts_implementation` tells of the class: gate, biases, layout.
Where nobody speaks, the model's own code runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from veneer.bases.stacked import Stacked
from veneer.kernels.grouped import ends_of, grouped
from veneer.methods.experts import ExpertLoRA
from veneer.model.leaf import Slotted
from veneer.model.packed import Wiring
from veneer.model.stream import Span

LEAVES = "veneer_leaves"


class Routes:
    """Which rows go to which expert: each token is K rows, sorted by expert."""

    def __init__(self, expert_TK: Tensor, experts: int) -> None:
        self.tokens, self.each = expert_TK.shape
        self.experts = experts
        self.expert_S, self.order_S = torch.sort(expert_TK.reshape(-1), stable=True)
        self.ends_E = ends_of(self.expert_S, experts)

    @cached_property
    def place_S(self) -> Tensor:
        """Where the K rows of the first token are, of the second, and so on."""
        return torch.argsort(self.order_S)

    def of(self, span: Span) -> tuple[Tensor, Tensor]:
        """The rows of a span's tokens, in the order of their experts, and where those of each expert end."""
        rows = self.place_S[span.start * self.each : span.stop * self.each].sort().values
        return rows, ends_of(self.expert_S[rows], self.experts)


class ExpertLeaf(Slotted):
    """One parameter of a layer's experts, with slots. It is fed rows in the order of their experts."""

    slots: nn.ModuleDict

    def __init__(self, experts: nn.Module, name: str, wiring: Wiring, path: str) -> None:
        super().__init__()
        self.slots = nn.ModuleDict()
        self.wiring, self.path = wiring, path
        self.held, self.name = [experts], name  # in a list: no part of this module
        self.register_load_state_dict_pre_hook(_keep_slots)

    @property
    def base(self) -> Stacked:
        [experts] = self.held
        return Stacked(getattr(experts, self.name), experts.is_transposed)

    @property
    def weight(self) -> Tensor:
        """The stored weight, for code that asks a layer for it (dtype, device)."""
        return getattr(self.held[0], self.name)

    def put(self, weight: Tensor) -> None:
        setattr(self.held[0], self.name, self.base.packed(weight).weight)

    def added(self, x_SI: Tensor, y_SO: Tensor, routes: Routes, spans: Sequence[Span]) -> Tensor:
        """y and what the spans' slots add to it."""
        for span in spans:
            method: ExpertLoRA = self.slots[span.slot]
            if (span.start, span.stop) == (0, routes.tokens):
                y_SO = y_SO + (method.routed(x_SI, routes.ends_E) * span.weight).to(y_SO.dtype)
            else:
                rows, ends_E = routes.of(span)
                delta = method.routed(x_SI[rows], ends_E) * span.weight
                y_SO = y_SO.index_add(0, rows, delta.to(y_SO.dtype))
        return y_SO

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing: adapters are taken with `veneer.take`."""
        return kwargs.get("destination", args[0] if args else {})


def _keep_slots(leaf: ExpertLeaf, state: dict[str, Tensor], prefix: str, *_unused: Any) -> None:
    """Before loading: slots keep what they hold, since they are not part of the model's state."""
    for name, value in leaf.named_parameters():
        state.setdefault(f"{prefix}{name}", value)


def expert_leaf_at(model: nn.Module, path: str, wiring: Wiring) -> ExpertLeaf:
    """The leaf of the parameter at `path`, put beside it now if there is none."""
    parent, _, name = path.rpartition(".")
    experts = model.get_submodule(parent)
    if LEAVES not in experts._modules:
        experts.add_module(LEAVES, nn.ModuleDict())
        experts.__dict__["forward"] = MethodType(_forward, experts)
    leaves = getattr(experts, LEAVES)
    if name not in leaves:
        leaves[name] = ExpertLeaf(experts, name, wiring, path).train(experts.training)
    return leaves[name]


def release(model: nn.Module) -> None:
    """Takes all leaves of experts off: their modules are as they were."""
    for module in list(model.modules()):
        if LEAVES in module._modules:
            del module._modules[LEAVES]
            del module.__dict__["forward"]


@torch.compiler.disable
def _forward(experts: Any, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What stands for the module's forward; its arguments are those of transformers' interface."""
    leaves = getattr(experts, LEAVES)
    speaking = {name: spans for name, leaf in leaves.items() if (spans := leaf.spans(len(hidden_TD)))}
    if not speaking:
        return type(experts).forward(experts, hidden_TD, expert_TK, weight_TK)
    routes = Routes(expert_TK, experts.num_experts)

    def product(name: str, x_SI: Tensor) -> Tensor:
        weight = getattr(experts, name)
        y_SO = grouped(x_SI.to(weight.dtype), weight.mT if experts.is_transposed else weight, routes.ends_E)
        y_SO = leaves[name].added(x_SI, y_SO, routes, speaking[name]) if name in speaking else y_SO
        return y_SO + getattr(experts, f"{name}_bias")[routes.expert_S] if experts.has_bias else y_SO

    x_SD = hidden_TD[routes.order_S // routes.each]
    if experts.has_gate:
        inner_SI = experts._apply_gate(product("gate_up_proj", x_SD))
    else:
        inner_SI = experts.act_fn(product("up_proj", x_SD))
    y_SD = product("down_proj", inner_SI)
    if getattr(experts, "has_post_expert_norm", False):
        y_SD = experts.post_expert_norm(y_SD)
    y_SD = y_SD * weight_TK.reshape(-1)[routes.order_S, None]
    return y_SD[routes.place_S].view(*expert_TK.shape, -1).sum(1).to(hidden_TD.dtype)
