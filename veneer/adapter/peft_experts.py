"""Experts in PEFT's layout: what `target_parameters` names, with the factors of all of a layer's experts in one pair.

Legend: E experts, R rank, I in, O out.

A is (E·R, I), the ranks of one expert together; B is (O, R·E), read as (O, R, E): the experts of one rank together. A
wrapper stands around the whole module for each of its parameters, the first innermost, so that the keys name the
module, and how deep: `<module>.base_layer.lora_A.weight` for gate_up_proj, `<module>.lora_A.weight` for down_proj.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from veneer.adapter.experts import numbered
from veneer.adapter.faults import add_fault
from veneer.adapter.patterns import TooCostly, named
from veneer.model.experts import PROJECTIONS

WRAPPER = ".base_layer"
Held = dict[str, Tensor]


def wrapped(parameters: Sequence[str]) -> dict[str, str]:
    """Parameter path -> the path that PEFT's keys have for it, of all parameters that an adapter has factors for."""
    modules: dict[str, list[str]] = {}
    for parameter in sorted(parameters, key=lambda path: PROJECTIONS.index(path.rpartition(".")[2])):
        modules.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return {
        parameter: module + WRAPPER * (len(inside) - 1 - depth)
        for module, inside in modules.items()
        for depth, parameter in enumerate(inside)
    }


def unwrapped(
    config: Mapping[str, Any], stored: Mapping[str, Held], faults: list[str]
) -> tuple[dict[str, Held], set[str]]:
    """The modules as stored, with those that wrap experts under the paths of their parameters; and these paths.

    Appended to `faults`: targets that are no experts, and factors that no target explains.
    """
    targets = config.get("target_parameters") or []
    if not (isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
        faults.append(f"target_parameters: got {targets!r:.80}, wanted a list of names")
        return dict(stored), set()
    odd = [f"{target!r:.80}" for target in targets if target.rpartition(".")[2] not in PROJECTIONS]
    add_fault(faults, f"target_parameters: only experts' {', '.join(PROJECTIONS)} are read", odd)
    names = _wrapped_names(config, stored, targets, faults)
    nested = [module for module in stored if module.endswith(WRAPPER) and module not in names]
    add_fault(faults, "factors around a wrapped layer that target_parameters does not explain", nested)
    lacking = sorted(set(names) - set(stored))
    add_fault(faults, "target_parameters means layers of experts of which factors are missing", lacking)
    twice = sorted(set(names.values()) & stored.keys())
    add_fault(faults, "factors under the name of a parameter that target_parameters means", twice)
    return {names.get(module, module): held for module, held in stored.items()}, set(names.values())


def _wrapped_names(
    config: Mapping[str, Any], stored: Mapping[str, Held], targets: Sequence[str], faults: list[str]
) -> dict[str, str]:
    """PEFT's path -> parameter path, of every module with factors that targets name a parameter of."""
    if not targets:
        return {}
    outer = sorted({module.partition(WRAPPER)[0] for module in stored})
    linear, told = set(), config.get("target_modules")
    try:
        if isinstance(told, (str, list)):
            linear = set(named(told, outer))
    except TooCostly as error:
        faults.append(f"target_modules: {error}")
    possible = [f"{module}.{name}" for module in outer if module not in linear for name in PROJECTIONS]
    return {path: parameter for parameter, path in wrapped(named(targets, possible)).items()}


def apart(parameter: str, held: Held, rank: int) -> dict[str, Held]:
    """Module path -> factors of each expert, a (R, I), b (O, R), of PEFT's pair."""
    a_ERI = held["a"].unflatten(0, (-1, rank))
    b_EOR = held["b"].unflatten(1, (rank, -1)).permute(2, 0, 1)
    each = zip(numbered(parameter, len(a_ERI)), a_ERI, b_EOR, strict=True)
    return {module: {"a": a_RI, "b": b_OR} for module, a_RI, b_OR in each}


def joined(held: Mapping[str, Tensor]) -> Held:
    """PEFT's pair of a (E, R, I), b (E, O, R)."""
    return {"a": held["a"].flatten(0, 1), "b": held["b"].permute(1, 2, 0).flatten(1).contiguous()}
