"""Evaluation of files: what `veneer eval` runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.adapter.take import storage_note
from veneer.config import EvalSettings
from veneer.config.values import MAX_LENGTH
from veneer.data.encode import family_of
from veneer.data.files import Row
from veneer.data.sources import read_source
from veneer.errors import ConfigError
from veneer.evaluate.harness import check_installed, evaluate_tasks
from veneer.evaluate.labels import labels_of
from veneer.evaluate.metrics import check_names
from veneer.evaluate.result import DIFFERENCES
from veneer.evaluate.run import Result, evaluate
from veneer.model.load import load

OF_TEXT = ("loss", "perplexity")  # what is measured where nothing was asked for and nothing is answered


def evaluate_files(settings: EvalSettings) -> Result:
    """Base and adapters of the settings on their data file, or on the tasks of `settings.harness`.

    Every check that needs no weights comes first. Raises ConfigError, DataError, AdapterError, WrongBaseError.
    """
    if settings.base_model is None:
        raise ConfigError("which base model? give --base-model")
    rows: list[Row] = []
    metrics: list[str] = []
    if settings.dataset is not None:
        check_names(settings.metrics)
        rows = read_source(settings.dataset, settings.columns, settings.limit).rows
        metrics = _fitting(settings, rows)
    else:
        check_installed()
    adapters = {label: Adapter.load(folder) for label, folder in _labels(settings.adapter).items()}
    prompt = system_prompt(adapters) if settings.system_prompt is None else settings.system_prompt
    loaded = load(settings.base_model, settings.dtype, storage=settings.storage)
    for label, adapter in adapters.items():
        if note := storage_note(adapter, loaded.storage, label):
            print(f"note: {note}", file=sys.stderr)
    for label, adapter in adapters.items():
        attach(loaded.model, adapter, label)
    shared: dict[str, Any] = {
        "slots": {"base": None, **{label: label for label in adapters}},
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "system_prompt": prompt,
        "progress": lambda message: print(message, file=sys.stderr),
    }
    if settings.dataset is None:
        return evaluate_tasks(
            loaded,
            settings.harness,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            apply_chat_template=settings.apply_chat_template,
            **shared,
        )
    return evaluate(
        loaded,
        rows,
        metrics=metrics,
        max_new_tokens=settings.max_new_tokens,
        max_length=settings.max_length or max((one.card.max_length for one in adapters.values()), default=MAX_LENGTH),
        where=settings.dataset,
        **shared,
    )


def _fitting(settings: EvalSettings, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics asked for; where none were, those of the usual ones that the rows allow."""
    if "metrics" in settings.model_fields_set or family_of(rows) != "text":
        return settings.metrics
    print(f"note: {settings.dataset} is text without answers: {' and '.join(OF_TEXT)} alone", file=sys.stderr)
    return list(OF_TEXT)


def system_prompt(adapters: Mapping[str, Adapter]) -> str | None:
    """The system prompt that the adapters were trained with. Raises ConfigError when they differ."""
    prompts = {label: adapter.card.system_prompt for label, adapter in adapters.items()}
    if len(set(prompts.values())) > 1:
        told = "; ".join(f"{label}: {prompt!r}" for label, prompt in prompts.items())
        raise ConfigError(
            f"the adapters were trained with different system prompts ({told}); evaluate them one at a "
            "time, or give all the same --system-prompt"
        )
    return next(iter(prompts.values()), None)


def _labels(folders: list[str]) -> dict[str, str]:
    """One adapter is called 'adapter', several by their folders' names."""
    if len(folders) == 1:
        return {"adapter": folders[0]}
    return dict(zip(labels_of(folders, DIFFERENCES), folders, strict=True))
