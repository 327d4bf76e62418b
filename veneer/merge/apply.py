"""Several adapters and a recipe -> one adapter, with a report of what the merge left out.

Layers are merged by a pool of threads, one thread of arithmetic each: torch's own threads gain nothing at these shapes,
and cost tens of times the work where another process holds a core. So the bytes do not depend on the number of cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from veneer.adapter.card import Adapter, Card
from veneer.errors import AdapterError, ConfigError, listed
from veneer.merge.layer import Layer, merge_layer
from veneer.merge.leveled import leveled
from veneer.merge.method import Merge, Parent
from veneer.merge.parents import check_parents, common, common_base, layers
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


@dataclass(frozen=True)
class CombineReport:
    """What the merge left, over all layers and for each.

    kept: share of the merged ‖ΔW‖² over all layers. error: Frobenius norm of what was left out over that of the whole.
    """

    recipe: Recipe
    parents: tuple[str, ...]
    kept: float
    error: float
    worst_layer: str
    worst_kept: float
    layers: dict[str, LayerReport]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "recipe": self.recipe.to_json(), "kinds": by_kind(self.layers)}


def combine(
    adapters: Sequence[Adapter], recipe: Recipe, progress: bool = True, names: Sequence[str] | None = None
) -> tuple[Adapter, CombineReport]:
    """One adapter out of several. Layers that an adapter lacks count as zero there, which the report says.

    names: how the adapters are called in messages, by their places in the list if left out.

    The order of the adapters does not change a bit of the result, unless the method says that it counts. Raises
    ConfigError for another number of weights than of adapters, WrongBaseError for adapters of several bases,
    NotMergeable for those that are more than B·A (DoRA), AdapterError for values that are not finite.
    """
    if len(adapters) != len(recipe.weights):
        raise ConfigError(f"weights: got {len(recipe.weights)} for {len(adapters)} adapters; give one for each")
    notes = check_parents(adapters, names or [f"adapter {i + 1}" for i in range(len(adapters))])
    merge = merge_named(recipe.method)
    identities = [adapter.identity for adapter in adapters]
    given = list(zip(identities, recipe.weights, adapters, strict=True))
    if not merge.ordered:  # sums of the same numbers in the same order: equal to the bit
        given.sort(key=lambda one: one[:2])
    stacks = {module: _parents(module, given) for module in layers([adapter for _, _, adapter in given])}
    merged = merge_layers(merge, stacks, recipe, progress)
    report = report_of(recipe, identities, merged, notes)
    return _adapter(adapters, merged, report), report


def _parents(module: str, given: Sequence[tuple[str, float, Adapter]]) -> list[Parent]:
    return [
        Parent(*adapter.factors(module), weight, f"{identity}/{module}")
        for identity, weight, adapter in given
        if f"{module}.a" in adapter.tensors
    ]


def merge_layers(
    merge: Merge, stacks: Mapping[str, Sequence[Parent]], recipe: Recipe, progress: bool
) -> dict[str, Layer]:
    """Every layer by itself. Raises AdapterError with all that cannot be merged."""
    settings, threads = recipe.settings, torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))
    tasks = {module: pool.submit(merge_layer, merge, parents, settings) for module, parents in stacks.items()}
    merged, faults = {}, []
    try:
        for module in shown(list(tasks), "merging", progress):
            try:
                merged[module] = tasks[module].result()
            except (ValueError, torch.linalg.LinAlgError) as error:
                faults.append(f"{module}: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what one thread sets, MKL takes for all
    if faults:
        raise AdapterError(listed("These layers cannot be merged:", faults, "Nothing was made."))
    return leveled(merged)


def report_of(
    recipe: Recipe, identities: Sequence[str], merged: Mapping[str, Layer], notes: list[str]
) -> CombineReport:
    """What was left of the layers; notes on the arithmetic are added to those given."""
    degenerate = [module for module, layer in merged.items() if layer.degenerate]
    if degenerate:
        many = f"{len(degenerate)} of {len(merged)} layers, such as {degenerate[0]}"
        notes = [*notes, f"singular values coincide in {many}: which directions were chosen is a matter of rounding"]
    if not any(layer.norm for layer in merged.values()):
        notes = [*notes, "the result is zero everywhere: the adapters cancel each other"]
    error = math.hypot(*(layer.error for layer in merged.values()))
    whole = math.hypot(error, *(layer.norm for layer in merged.values()))
    worst = min(merged, key=lambda module: merged[module].kept)
    return CombineReport(
        recipe=recipe,
        parents=tuple(identities),
        kept=1.0 - (error / whole) ** 2 if whole else 1.0,
        error=error / whole if whole else 0.0,
        worst_layer=worst,
        worst_kept=merged[worst].kept,
        layers={m: LayerReport(len(found.a), found.norm, found.kept, found.error) for m, found in merged.items()},
        notes=tuple(notes),
    )


def _adapter(adapters: Sequence[Adapter], merged: Mapping[str, Layer], report: CombineReport) -> Adapter:
    """The result and its card: what all parents agree on, the recipe, and the parents' identities."""
    cards = [adapter.card for adapter in adapters]
    training: dict[str, Any] = {"merge": report.recipe.to_json()}
    if prompt := common([card.system_prompt for card in cards]):
        training["options"] = {"system_prompt": prompt}
    transposed = any(card.settings.get("fan_in_fan_out") for card in cards)
    card = Card(
        method="lora",
        settings={"fan_in_fan_out": True} if transposed else {},
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
    return Adapter(named, card)
