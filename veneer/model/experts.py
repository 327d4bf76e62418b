"""Experts: transformers holds all of a layer's in one tensor of three dimensions, which no adapter goes on."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from veneer.model.text import text_modules


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> parameter (experts, rows, columns), in the model's order."""
    inside = text_modules(model)
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if module in inside and not isinstance(module, _ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def experts_note(model: nn.Module) -> str | None:
    """What to tell where layers are chosen by 'all-linear', or stored otherwise: experts are left as they are."""
    experts = expert_parameters(model)
    if not experts:
        return None
    kinds = sorted({".".join(path.split(".")[-2:]) for path in experts})
    count = next(iter(experts.values())).shape[0]
    share = sum(p.numel() for p in experts.values()) / sum(p.numel() for p in model.parameters())
    return f"{', '.join(kinds)} ({count} in a layer, {share:.0%} of this model's weights) are no linear layers"
