"""Experts in an adapter: each is a module of its own, `<path of the layer's parameter>.<number>`, with plain factors.

Legend: E experts, R rank, I in, O out.

So what reads, compares or merges adapters needs to know nothing of experts. On a model, and in a PEFT folder, those of
one layer are together: a (E, R, I), b (E, O, R).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.model.experts import PROJECTIONS


def parameter_of(module: str) -> str | None:
    """The path of the parameter that the expert `module` is a part of; None where it is no expert."""
    parameter, _, number = module.rpartition(".")
    is_expert = parameter.rpartition(".")[2] in PROJECTIONS and "." in parameter and number.isdecimal()
    return parameter if is_expert else None


def numbered(parameter: str, experts: int) -> list[str]:
    """The modules that the experts of a parameter are."""
    return [f"{parameter}.{number}" for number in range(experts)]


def together(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Module path -> kind -> tensor, with the experts of one parameter as one: a (E, R, I), b (E, O, R).

    Raises ValueError where experts are missing in between, are of different ranks, or have more than factors.
    """
    found: dict[str, dict[str, Tensor]] = {}
    experts: dict[str, dict[str, Mapping[str, Tensor]]] = {}
    for module, held in modules.items():
        if (parameter := parameter_of(module)) is None:
            found[module] = dict(held)
        else:
            experts.setdefault(parameter, {})[module] = held
    return found | {parameter: _stacked(parameter, members) for parameter, members in experts.items()}


def _stacked(parameter: str, members: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = numbered(parameter, len(members))
    if not members.keys() == set(names) or any(held.keys() != {"a", "b"} for held in members.values()):
        raise ValueError(f"{parameter} lacks plain factors for some of its experts; it has {', '.join(members)}")
    ranks = sorted({len(held["a"]) for held in members.values()})
    if len(ranks) > 1:
        raise ValueError(
            f"{parameter} has experts of ranks {', '.join(map(str, ranks))}, wanted one rank for all of them"
        )
    return {kind: torch.stack([members[name][kind] for name in names]) for kind in ("a", "b")}
