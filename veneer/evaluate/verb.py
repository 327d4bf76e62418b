"""Evaluation of files: what `veneer eval` runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.adapter.attach import attach, is_name, storage_note
from veneer.adapter.card import Adapter
from veneer.config import EvalSettings
from veneer.data.encode import family_of
from veneer.data.sources import read_source
from veneer.errors import ConfigError
from veneer.evaluate.metrics import LIKELIHOOD, check_names
from veneer.evaluate.run import Result, evaluate
from veneer.model.load import load


def evaluate_files(settings: EvalSettings) -> Result:
    """Base and adapters of the settings on their data file; written to `settings.output` where that is given.

    Every check that needs no weights comes first. Raises ConfigError, DataError, AdapterError, WrongBaseError.
    """
    if settings.base_model is None:
        raise ConfigError("which base model? give --base-model")
    check_names(settings.metrics)
    rows = read_source(settings.dataset, settings.columns, settings.limit).rows
    metrics = _fitting(settings, rows)
    adapters = {label: Adapter.load(folder) for label, folder in _labels(settings.adapter).items()}
    prompt = system_prompt(adapters)
    loaded = load(settings.base_model, settings.dtype, storage=settings.storage)
    for label, adapter in adapters.items():
        if note := storage_note(adapter, loaded.storage, label):
            print(f"note: {note}", file=sys.stderr)
    for label, adapter in adapters.items():
        attach(loaded.model, adapter, label)
    result = evaluate(
        loaded,
        rows,
        slots={"base": None, **{label: label for label in adapters}},
        metrics=metrics,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
        system_prompt=prompt,
        where=settings.dataset,
        progress=lambda message: print(message, file=sys.stderr),
    )
    if settings.output is not None:
        Path(settings.output).write_text(json.dumps(result.to_json(), ensure_ascii=False, indent=1) + "\n")
    return result


def _fitting(settings: EvalSettings, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics asked for; where none were, those of the usual ones that the rows allow."""
    if "metrics" in settings.model_fields_set or family_of(rows) != "text":
        return settings.metrics
    print(f"note: {settings.dataset} is text without answers: {' and '.join(LIKELIHOOD)} alone", file=sys.stderr)
    return list(LIKELIHOOD)


def system_prompt(adapters: Mapping[str, Adapter]) -> str | None:
    """The system prompt that the adapters were trained with. Raises ConfigError when they differ."""
    prompts = {label: adapter.card.system_prompt for label, adapter in adapters.items()}
    if len(set(prompts.values())) > 1:
        told = "; ".join(f"{label}: {prompt!r}" for label, prompt in prompts.items())
        raise ConfigError(
            f"the adapters were trained with different system prompts ({told}); evaluate them one at a time"
        )
    return next(iter(prompts.values()), None)


def _labels(folders: list[str]) -> dict[str, str]:
    """One adapter is called 'adapter', several by their folders' names."""
    if len(folders) == 1:
        return {"adapter": folders[0]}
    names = [re.sub(r"[^A-Za-z0-9_-]", "_", Path(folder).resolve().name)[:50] for folder in folders]
    unique = [
        name if names.count(name) == 1 and is_name(name) else f"{name}_{i}" for i, name in enumerate(names, start=1)
    ]
    return dict(zip(unique, folders, strict=True))
