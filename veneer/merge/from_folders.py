"""Adapter folders and a recipe -> an adapter folder with its recipe: what `veneer merge` runs.

In `recipe.yaml` adapters and data files are named by path, relative to the file, and by what they hold:
`../a@sha256:...`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.adapter.card import Adapter
from veneer.config import MergeSettings, dump_yaml
from veneer.config.adapters import OF_DATA
from veneer.config.verbs import BaseSettings
from veneer.errors import AdapterError, listed
from veneer.merge.apply import CombineReport, combine
from veneer.merge.data import ParentRows, read_rows
from veneer.merge.folder import free, whole
from veneer.merge.on_base import OnBase, put_merged, put_on_base
from veneer.merge.parents import check_parents
from veneer.merge.pinned import Named, named, pinned, relative
from veneer.merge.recipe import Recipe
from veneer.model.load import Loaded
from veneer.model.progress import shown
from veneer.model.source import PACKAGED

RECIPE = "recipe.yaml"
_HEAD = "# Makes this adapter again: veneer merge {name} --output FOLDER. Paths are relative to this file.\n"


# The base with parents and result on it, the parents, their rows -> name and text of files to lie beside the result.
Compare = Callable[[OnBase, Sequence[Adapter], Sequence[ParentRows]], Mapping[str, str]]


def merge_folders(
    settings: MergeSettings, progress: bool = True, base: str | None = None, compare: Compare | None = None
) -> CombineReport:
    """Reads the adapters, merges them, and writes adapter and recipe to `settings.output`, whole or not at all.

    base: the base model where there is data and the settings name none. compare: what the result is
    worth; called where there is data.
    Raises ConfigError where the output is in the way, AdapterError with every folder that cannot be read or holds
    another adapter than it should, DataError likewise, and what `combine` raises.
    """
    output, given = free(settings.output), [named(text) for text in settings.adapters]
    weights = settings.weights or [1 / len(given)] * len(given)
    recipe = Recipe(settings.method, tuple(weights), settings.method_options())
    adapters, names = _read(given, progress), [one.path for one in given]
    check_parents(adapters, names)  # before a base is loaded for them
    rows = read_rows(settings, recipe.reads_data, [adapter.card.max_length for adapter in adapters])
    on_base = put_on_base(settings, base, adapters, names, rows) if rows else None
    merged, report = combine(adapters, recipe, progress, names, on_base)
    made = {
        RECIPE: _HEAD.format(name=RECIPE) + dump_yaml(_recipe(settings, recipe, report.parents, on_base, rows, output))
    }
    if on_base is not None and compare is not None:
        put_merged(on_base, merged)
        made |= compare(on_base, adapters, rows)
    del adapters  # before the result is written, which takes its size once more
    with whole(output) as partial:
        merged.save(partial)
        for name, text in made.items():
            (partial / name).write_text(text, encoding="utf-8")
    return replace(report, notes=(*report.notes, *_halves(recipe, rows)))


def _halves(recipe: Recipe, rows: Sequence[ParentRows]) -> list[str]:
    if not recipe.reads_data:
        return []
    read, rest = sum(len(one.fitted) for one in rows), sum(len(one.held_out) for one in rows)
    return [f"{recipe.what_reads_data} has read {read:,} rows, every other one; compared on the other {rest:,} alone"]


def _read(given: Sequence[Named], progress: bool) -> list[Adapter]:
    adapters, faults = [], []
    for one in shown(given, "reading adapters", progress):
        try:
            adapter = Adapter.load(one.path)
        except AdapterError as error:
            faults.append(str(error))
            continue
        adapters.append(adapter)
        if one.identity not in (None, adapter.identity):
            faults.append(
                f"{one.path} holds another adapter than the recipe was written for: identity {adapter.identity}, "
                f"wanted {one.identity}. Restore it; or, to merge what is there now, leave @sha256:... out"
            )
    if faults:
        raise AdapterError(faults[0] if len(faults) == 1 else listed("These adapters cannot be merged:", faults))
    return adapters


def _recipe(
    settings: MergeSettings,
    recipe: Recipe,
    identities: Sequence[str],
    on_base: OnBase | None,
    rows: Sequence[ParentRows],
    output: Path,
) -> dict[str, Any]:
    """All that makes the same bytes again; every option, so that no later default changes them."""
    options = {name: value for name, value in recipe.settings.to_flat().items() if value is not None}
    paths = [named(text).path for text in settings.adapters]
    adapters = [pinned(path, identity, output) for path, identity in zip(paths, identities, strict=True)]
    made = {"method": recipe.method, **options, "weights": list(recipe.weights), "adapters": adapters}
    return made | (_data(settings, on_base.loaded, rows, output) if on_base else {})


def _data(settings: MergeSettings, loaded: Loaded, rows: Sequence[ParentRows], output: Path) -> dict[str, Any]:
    names = (*OF_DATA, *BaseSettings.model_fields)
    given = {name: getattr(settings, name) for name in names if name in settings.model_fields_set}
    base = loaded.name
    if base not in PACKAGED and os.path.exists(base):
        base = os.path.join(".", relative(base, output))
    # What was found out stands there as if it had been given: another machine may find something else.
    given |= {"base_model": base, "dtype": str(loaded.model.dtype).removeprefix("torch.")}
    if len(lengths := {one.max_length for one in rows}) == 1:  # else they are those of the adapters' cards
        given |= {"max_length": lengths.pop()}
    told = {name: given[name] for name in names if given.get(name) not in (None, {})}
    return {"dataset": [pinned(one.path, one.sha256, output) for one in rows], **told}
