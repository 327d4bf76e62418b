"""Experts in an adapter: each is a module of its own, `<path of the layer's parameter>.<number>`, with plain factors.

Legend: E experts, R rank, I in, O out.

So what reads, compares or merges adapters needs to know nothing of experts. On a model, and in a PEFT folder, those of
one layer are together: a (E, R, I), b (E, O, R).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veneer.methods.experts import stacked
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
    """Module path -> kind -> tensor, with the experts of one parameter as one: a (E, R, I), b (E, O, R), R the highest
    rank among them. Raises ValueError where experts are missing in between, or have more than factors.
    """
    found: dict[str, dict[str, Tensor]] = {}
    experts: dict[str, dict[str, Mapping[str, Tensor]]] = {}
    for module, held in modules.items():
        if (parameter := parameter_of(module)) is None:
            found[module] = dict(held)
        else:
            experts.setdefault(parameter, {})[module] = held
    for parameter, members in experts.items():
        ordered = [members.get(module) for module in numbered(parameter, len(members))]
        if any(held is None or set(held) != {"a", "b"} for held in ordered):
            raise ValueError(f"{parameter} lacks plain factors for some of its experts; it has {', '.join(members)}")
        a_ERI, b_EOR = stacked([(held["a"], held["b"]) for held in ordered if held is not None])
        found[parameter] = {"a": a_ERI, "b": b_EOR}
    return found
