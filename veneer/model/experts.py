"""Experts: transformers holds all of a layer's in one parameter of three dimensions; which of these hold adapters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from veneer.methods.base import Method
from veneer.model.text import text_modules

# In the order in which modules hold them, and in which PEFT nests its wrappers around a module.
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
# What transformers' `use_experts_implementation` tells of a class of experts: all that computing them takes, but for
# `has_post_expert_norm`, which 5.17 knows nothing of.
_TOLD = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> parameter (experts, rows, columns), in the model's order."""
    inside = text_modules(model)
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if module in inside and not isinstance(module, (_ConvNd, Method))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def expert_paths(model: nn.Module) -> list[str]:
    """Paths of those that can hold an adapter, in the model's order."""
    return [path for path in expert_parameters(model) if why_not(model, path) is None]


def why_not(model: nn.Module, path: str) -> str | None:
    """Why the experts at `path` hold no adapter; None where they do."""
    parent, _, name = path.rpartition(".")
    experts = model.get_submodule(parent)
    kind, dtype = type(experts).__name__, getattr(experts, name).dtype
    if not all(hasattr(experts, told) for told in _TOLD) or name not in _projections(experts):
        return f"the experts of a layer, which {kind} computes in a way of its own, so they stay frozen"
    if getattr(experts, "_is_expert_parallel", False):
        return "experts that several processes share out, which stay frozen"
    if dtype not in _FLOATS:
        return f"the experts of a layer stored as {str(dtype).removeprefix('torch.')}, which stay frozen"
    return None


def _projections(experts: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def is_experts(model: nn.Module, path: str) -> bool:
    """Whether what stands at `path` is a parameter of experts."""
    parent, _, name = path.rpartition(".")
    try:
        found = getattr(model.get_submodule(parent), name, None)
    except AttributeError:
        return False
    return isinstance(found, nn.Parameter) and found.dim() == 3


def experts_note(model: nn.Module) -> str | None:
    """What to tell where layers are chosen by 'all-linear', or stored otherwise: experts are left as they are."""
    experts = expert_parameters(model)
    if not experts:
        return None
    kinds = sorted({".".join(path.split(".")[-2:]) for path in experts})
    count = next(iter(experts.values())).shape[0]
    share = sum(p.numel() for p in experts.values()) / sum(p.numel() for p in model.parameters())
    return f"{', '.join(kinds)} ({count} in a layer, {share:.0%} of this model's weights) are no linear layers"
