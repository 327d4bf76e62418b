"""Adapter folders and a recipe -> an adapter folder with its recipe: what `veneer merge` runs.

In `recipe.yaml` adapters are named by path, relative to the file, and by identity: `../a@sha256:...`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapter.card import Adapter
from veneer.config import MergeSettings, dump_yaml
from veneer.errors import AdapterError, listed
from veneer.merge.apply import CombineReport, combine
from veneer.merge.folder import free, whole
from veneer.merge.recipe import Recipe
from veneer.model.progress import shown

RECIPE = "recipe.yaml"
_PINNED = re.compile(r"(?P<path>.+)@sha256:(?P<identity>[0-9a-f]{64})")
_HEAD = "# Makes this adapter again: veneer merge {name} --output FOLDER. Paths are relative to this file.\n"


@dataclass(frozen=True)
class Named:
    """An adapter as it is named: where it lies, and which one it has to be."""

    path: str
    identity: str | None = None


def named(text: str) -> Named:
    """`FOLDER` or `FOLDER@sha256:IDENTITY`."""
    found = _PINNED.fullmatch(text)
    return Named(found["path"], found["identity"]) if found else Named(text)


def merge_folders(settings: MergeSettings, progress: bool = True) -> CombineReport:
    """Reads the adapters, merges them, and writes adapter and recipe to `settings.output`, whole or not at all.

    Raises ConfigError where the output is in the way, AdapterError with every folder that cannot be read or holds
    another adapter than it should, and what `combine` raises.
    """
    output, given = free(settings.output), [named(text) for text in settings.adapters]
    weights = settings.weights or [1 / len(given)] * len(given)
    recipe = Recipe(settings.method, tuple(weights), settings.method_options())
    adapters = _read(given, progress)
    merged, report = combine(adapters, recipe, progress, [one.path for one in given])
    with whole(output) as partial:
        merged.save(partial)
        text = _HEAD.format(name=RECIPE) + dump_yaml(_recipe(recipe, given, report.parents, output))
        (partial / RECIPE).write_text(text, encoding="utf-8")
    return report


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


def _recipe(recipe: Recipe, given: Sequence[Named], identities: Sequence[str], output: Path) -> dict[str, Any]:
    """All that makes the same bytes again; every option, so that no later default changes them."""
    options = {name: value for name, value in recipe.settings.to_flat().items() if value is not None}
    adapters = [
        f"{_relative(one.path, output)}@sha256:{identity}" for one, identity in zip(given, identities, strict=True)
    ]
    return {"method": recipe.method, **options, "weights": list(recipe.weights), "adapters": adapters}


def _relative(path: str, output: Path) -> str:
    try:
        return os.path.relpath(os.path.realpath(path), os.path.realpath(output))
    except ValueError:  # on another drive
        return os.path.realpath(path)
