"""Several adapters and a recipe -> one adapter, with a report of what the merge left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from veneer.adapter.card import Adapter, Card
from veneer.adapter.peft_vocabulary import EMBEDDINGS
from veneer.errors import AdapterError, ConfigError, listed
from veneer.lowrank.workers import workers
from veneer.merge.aware import cut_by_activations, uncut
from veneer.merge.layer import Layer, merge_layer
from veneer.merge.leveled import leveled
from veneer.merge.method import Merge, Parent, Stacks
from veneer.merge.on_base import OnBase
from veneer.merge.parents import check_parents, common, common_base, layers, twice
from veneer.merge.recipe import Recipe
from veneer.merge.summary import by_kind
from veneer.merge.table import merge_named
from veneer.model.progress import shown


@dataclass(frozen=True)
class LayerReport:
    """What the merge left of one layer.

    rank: of the result. norm: its Frobenius norm. kept: share of the merged ‖ΔW‖² that the rank has left. error:
    Frobenius norm of what it left out.
    """

    rank: int
    norm: float
    kept: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What arithmetic on adapters has left, over all layers and for each.

    kept: share of ‖ΔW‖² over all layers. error: Frobenius norm of what was left out over that of the whole.
    learned: what a method that reads data found there.
    """

    kept: float
    error: float
    worst_layer: str
    worst_kept: float
    layers: dict[str, LayerReport]
    notes: tuple[str, ...]
    learned: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "kinds": by_kind(self.layers)}


@dataclass(frozen=True, kw_only=True)
class CombineReport(Report):
    """What a merge has left of the merged updates."""

    recipe: Recipe
    parents: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "recipe": self.recipe.to_json()}


def combine(
    adapters: Sequence[Adapter],
    recipe: Recipe,
    progress: bool = True,
    names: Sequence[str] | None = None,
    on_base: OnBase | None = None,
) -> tuple[Adapter, CombineReport]:
    """One adapter out of several. Layers that an adapter lacks are merged without it, which the report says.

    names: how the adapters are called in messages, by their places in the list if left out. on_base: the adapters on
    their base, in the same order, with rows for methods that read data.

    The order of the adapters does not change a bit of the result, unless the method says that it counts. Raises
    ConfigError for another number of weights than of adapters, WrongBaseError for adapters of several bases,
    NotMergeable for those that are more than B·A (DoRA), AdapterError for values that are not finite.
    """
    if len(adapters) != len(recipe.weights):
        raise ConfigError(f"weights: got {len(recipe.weights)} for {len(adapters)} adapters; give one for each")
    if recipe.reads_data and on_base is None:
        raise ConfigError(f"{recipe.what_reads_data} reads data: give --dataset, a data file for each adapter")
    names = names or [f"adapter {i + 1}" for i in range(len(adapters))]
    notes = check_parents(adapters, names)
    merge = merge_named(recipe.method)
    with workers() as pool:
        identities = list(pool.map(lambda adapter: adapter.identity, adapters))
    notes += twice(identities, names)
    slots = on_base.slots if on_base else [""] * len(adapters)
    given = list(zip(identities, recipe.weights, adapters, slots, strict=True))
    if not merge.ordered:  # sums of the same numbers in the same order: equal to the bit
        given.sort(key=lambda one: (one[0], one[1], one[3]))
    stacks: Stacks = {module: _parents(module, given) for module in layers([adapter for _, _, adapter, _ in given])}
    learned: dict[str, Any] = {}
    if merge.learn and on_base:
        stacks, learned = merge.learn(stacks, on_base, recipe.settings, progress)
    aware = on_base is not None and getattr(recipe.settings, "activation_aware", False)
    with workers() as pool:
        merged = merge_layers(merge, stacks, uncut(recipe) if aware else recipe, progress, pool)
    if on_base and aware:
        merged, kept = cut_by_activations(merged, on_base, recipe.settings.to_flat()["rank"], progress)
        learned |= kept
    found = vars(report_of(merged, notes)) | {"learned": learned}
    report = CombineReport(recipe=recipe, parents=tuple(identities), **found)
    return _adapter(adapters, merged, report), report


def _parents(module: str, given: Sequence[tuple[str, float, Adapter, str]]) -> list[Parent]:
    return [
        Parent(*adapter.factors(module), weight, f"{identity}/{module}", slot)
        for identity, weight, adapter, slot in given
        if f"{module}.a" in adapter.tensors
    ]


def merge_layers(
    merge: Merge, stacks: Mapping[str, Sequence[Parent]], recipe: Recipe, progress: bool, pool: Executor
) -> dict[str, Layer]:
    """Every layer by itself. Raises AdapterError with all that cannot be merged. pool: of `workers`."""
    settings = recipe.settings
    tasks = {module: pool.submit(merge_layer, merge, parents, settings) for module, parents in stacks.items()}
    merged, faults = {}, []
    for module in shown(list(tasks), "merging", progress):
        try:
            merged[module] = tasks[module].result()
        except (ValueError, torch.linalg.LinAlgError) as error:
            faults.append(f"{module}: {error}")
    if faults:
        raise AdapterError(listed("These layers cannot be merged:", faults, "Nothing was made."))
    return leveled(merged)


def report_of(merged: Mapping[str, Layer], notes: list[str]) -> Report:
    """What was left of the layers; notes on the arithmetic are added to those given."""
    degenerate = [module for module, layer in merged.items() if layer.degenerate]
    if degenerate:
        many = f"{len(degenerate)} of {len(merged)} layers, such as {degenerate[0]}"
        notes = [*notes, f"singular values coincide in {many}: which directions were chosen is a matter of rounding"]
    if not any(layer.norm for layer in merged.values()):
        notes = [*notes, "the result is zero everywhere: at these weights nothing is left of the adapters"]
    error = math.hypot(*(layer.error for layer in merged.values()))
    whole = math.hypot(error, *(layer.norm for layer in merged.values()))
    worst = min(merged, key=lambda module: merged[module].kept)
    return Report(
        kept=1.0 - (error / whole) ** 2 if whole else 1.0,
        error=error / whole if whole else 0.0,
        worst_layer=worst,
        worst_kept=merged[worst].kept,
        layers={m: LayerReport(len(found.a), found.norm, found.kept, found.error) for m, found in merged.items()},
        notes=tuple(notes),
    )


def _embeddings(cards: Sequence[Card], merged: Mapping[str, Layer]) -> dict[str, list[str]]:
    """Which of the merged modules are embeddings, as the parents say."""
    told = {path for card in cards for path in card.settings.get(EMBEDDINGS, [])}
    return {EMBEDDINGS: sorted(told & set(merged))} if told & set(merged) else {}


def _adapter(adapters: Sequence[Adapter], merged: Mapping[str, Layer], report: CombineReport) -> Adapter:
    """The result and its card: what all parents agree on, the recipe, and the parents' identities."""
    cards = [adapter.card for adapter in adapters]
    training: dict[str, Any] = {"merge": report.recipe.to_json()}
    if report.learned:
        training["learned"] = dict(report.learned)
    # How the rows of all parents are read: the same prompt, or none; as long as the longest.
    options = {
        "system_prompt": common([card.system_prompt for card in cards]),
        "max_length": max(filter(None, (card.trained_length for card in cards)), default=None),
    }
    if told := {name: value for name, value in options.items() if value}:
        training["options"] = told
    transposed = any(card.settings.get("fan_in_fan_out") for card in cards)
    card = Card(
        method="lora",
        settings={**({"fan_in_fan_out": True} if transposed else {}), **_embeddings(cards, merged)},
        scales=dict.fromkeys(merged, 1.0),
        ranks={module: len(layer.a) for module, layer in merged.items()},
        base=common_base(adapters),
        base_name=common([card.base_name for card in cards]),
        storage=common([card.storage for card in cards]),
        template_text=common([card.template_text for card in cards]),
        training=training,
        parents=report.parents,
    )
    named = {f"{module}.a": layer.a for module, layer in merged.items()}
    named |= {f"{module}.b": layer.b for module, layer in merged.items()}
    return Adapter(named, card, copied=False)
