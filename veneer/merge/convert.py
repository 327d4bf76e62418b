"""Any adapter -> plain LoRA of scale 1, at a lower rank if asked for: what `veneer convert` runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from veneer.adapter.card import Adapter
from veneer.config import ConvertSettings
from veneer.errors import NotMergeable
from veneer.lowrank import norm
from veneer.lowrank.workers import workers
from veneer.merge.apply import Report, merge_layers, report_of
from veneer.merge.folder import free, whole
from veneer.merge.layer import Layer
from veneer.merge.method import Parent
from veneer.merge.recipe import Recipe
from veneer.merge.table import merge_named


@dataclass(frozen=True, kw_only=True)
class ConvertReport(Report):
    """What an adapter is and what it was, and what the cut has left of it: all, without one."""

    identity: str
    parent: str
    parameters: int
    parameters_before: int


def convert_folder(settings: ConvertSettings, progress: bool = True) -> ConvertReport:
    """Reads the adapter and writes it, converted, to `settings.output`, whole or not at all.

    Raises ConfigError where the output is in the way, and what `converted` and reading an adapter raise.
    """
    output = free(settings.output)
    adapter, report = converted(Adapter.load(str(settings.adapter)), settings.rank, settings.energy, progress)
    with whole(output) as partial:
        adapter.save(partial)
    return report


def converted(
    adapter: Adapter, rank: int | None = None, energy: float | None = None, progress: bool = True
) -> tuple[Adapter, ConvertReport]:
    """Plain LoRA. Without a limit the factors stay as they are, and so does the identity; else each layer is the best
    approximation (Eckart-Young) of at most `rank` directions, or of the fewest that keep a share `energy` of ‖ΔW‖².

    Trained rows of tokens stay as they are. Raises NotMergeable for a method that is more than B·A.
    """
    if adapter.card.method != "lora":
        raise NotMergeable(
            f"the adapter is {adapter.card.method}, which is more than B·A: plain LoRA alone does not hold it. Next: "
            "veneer merge ADAPTER --into-base -o MODEL, then veneer convert --extract MODEL --base-model BASE --rank N "
            "-o ADAPTER (a dora; a learned bias is no part of a weight)"
        )
    cuts = rank is not None or energy is not None
    recipe = Recipe("linear", (1.0,), {"rank": rank, "energy": energy})
    layers = _cut(adapter, recipe, progress) if cuts else _as_they_are(adapter)
    notes = ["base unverified: the adapter does not record which base it was trained on"] * (adapter.card.base is None)
    found = _adapter(adapter, layers, {"rank": rank, "energy": energy}) if cuts else adapter
    return found, ConvertReport(
        identity=found.identity,
        parent=adapter.identity,
        parameters=_parameters(found),
        parameters_before=_parameters(adapter),
        **vars(report_of(layers, notes)),
    )


def _cut(adapter: Adapter, recipe: Recipe, progress: bool) -> dict[str, Layer]:
    stacks = {module: [Parent(*adapter.factors(module))] for module in adapter.modules()}
    with workers() as pool:
        return merge_layers(merge_named(recipe.method), stacks, recipe, progress, pool)


def _as_they_are(adapter: Adapter) -> dict[str, Layer]:
    factors = {module: adapter.factors(module) for module in adapter.modules()}
    return {module: Layer(a_RI, b_OR, norm(a_RI, b_OR), 1.0, 0.0, False) for module, (a_RI, b_OR) in factors.items()}


def _adapter(adapter: Adapter, layers: dict[str, Layer], options: dict[str, Any]) -> Adapter:
    """The same card with other ranks: it was trained as it says there, and cut afterwards."""
    named = {name: tensor for name, tensor in adapter.tensors.items() if name.endswith(".rows")}
    named |= {f"{module}.a": layer.a for module, layer in layers.items()}
    named |= {f"{module}.b": layer.b for module, layer in layers.items()}
    card = replace(
        adapter.card,
        ranks={module: len(layer.a) for module, layer in layers.items()},
        training={**adapter.card.training, "convert": options},
        parents=(adapter.identity,),
    )
    return Adapter(named, card)


def _parameters(adapter: Adapter) -> int:
    return sum(tensor.numel() for tensor in adapter.tensors.values())
