"""The base with every parent on it, for methods that read data and for the comparison of what was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.adapter.take import storage_note
from veneer.config import MergeSettings
from veneer.data.chat import Template
from veneer.data.encode import encode
from veneer.data.examples import Example
from veneer.errors import ConfigError
from veneer.merge.data import ParentRows
from veneer.model.added_tokens import tokenizer_of
from veneer.model.load import Loaded, load
from veneer.notes import tell

MERGED = "merged"
OF_TOKENS = {"loss", "perplexity", "token_accuracy"}  # metrics that read rows as tokens, no generated text


@dataclass(frozen=True)
class OnBase:
    """A base and the slots of its parents.

    slots: of the adapters in the order they were given; named after identities, so that what is done in the order of
    the names does not depend on it. examples: slot -> the rows that a method may read, empty where it reads none.
    """

    loaded: Loaded
    slots: tuple[str, ...]
    examples: Mapping[str, Sequence[Example]]


def put_on_base(
    settings: MergeSettings,
    base: str | None,
    adapters: Sequence[Adapter],
    names: Sequence[str],
    rows: Sequence[ParentRows],
) -> OnBase:
    """Loads the base, the one of the settings if they name one, and attaches the adapters.

    Raises ConfigError without a base, WrongBaseError, DataError.
    """
    name = settings.base_model or base
    if name is None:
        raise ConfigError("which base model? give --base-model")
    loaded = load(name, settings.dtype, storage=settings.storage)
    slots = _slots(adapters)
    for slot, adapter, name in sorted(zip(slots, adapters, names, strict=True), key=lambda one: one[0]):
        if note := storage_note(adapter, loaded.storage, name):
            tell(note)
        attach(loaded.model, adapter, slot)
    each = zip(slots, adapters, rows, strict=True)
    scored = bool(OF_TOKENS & set(settings.metrics))
    examples = {slot: _examples(loaded, slot, adapter, one, scored) for slot, adapter, one in each}
    return OnBase(loaded, tuple(slots), {slot: those for slot, those in examples.items() if those})


def put_merged(on_base: OnBase, merged: Adapter) -> None:
    """Attaches the result under the name of MERGED."""
    attach(on_base.loaded.model, merged, MERGED)


def _slots(adapters: Sequence[Adapter]) -> list[str]:
    seen: Counter[str] = Counter()
    slots = []
    for adapter in adapters:
        seen[adapter.identity] += 1
        slots.append(f"{adapter.identity[:32]}_{seen[adapter.identity]}")
    return slots


def _examples(loaded: Loaded, slot: str, adapter: Adapter, rows: ParentRows, scored: bool) -> Sequence[Any]:
    """Those of the rows that the method reads. All rows are encoded where any is read or scored by tokens, so that
    faults are told before any work, by their place in the file."""
    if not (rows.fitting or scored):
        return ()
    template = Template(tokenizer_of(loaded, slot), adapter.card.system_prompt)
    whole = encode(rows.rows, template, rows.max_length, rows.path)
    if not rows.fitting:
        return ()
    for note in whole.notes:
        tell(f"{rows.name}: {note}")
    return encode(rows.fitted, template, rows.max_length, rows.path).examples
