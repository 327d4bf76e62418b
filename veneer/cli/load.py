"""Base and adapters, ready to speak, for the verbs that need a model in hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.cli.output import say
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.config import BaseSettings
    from veneer.data.chat import Conversation
    from veneer.model.load import Loaded


def base_of(base_model: str | None, folders: Sequence[str]) -> str:
    """The base to load: the one given, else the one that all adapters name. ConfigError: none, or several."""
    if base_model is not None:
        return base_model
    from veneer.adapter.card import Adapter

    named = {folder: Adapter.load(folder).card.base_name for folder in folders}
    bases = set(named.values())
    if len(bases) == 1 and (base := bases.pop()):
        say(f"base model: {_plain(base)}, as the adapter says")
        return base
    told = ", ".join(f"{folder} names {_plain(base) if base else 'none'}" for folder, base in named.items())
    raise ConfigError(f"which base model? {told}; give --base-model")


def _plain(text: str) -> str:
    """Text of an adapter's file: as it is, or, where it could pass for a line of ours, as Python writes it."""
    return text if text.isprintable() else repr(text)


@dataclass(frozen=True)
class Opened:
    """A base with its adapters attached, and the system prompt that each adapter (by slot) was trained with."""

    loaded: Loaded
    system_prompts: dict[str, str | None]

    def prompt_ids(self, conversation: Conversation, slot: str | None, system_prompt: str | None) -> list[int]:
        """What `slot` (None: the base) continues. `system_prompt` None: the one that the slot was trained with."""
        from veneer.data.chat import Template

        trained = self.system_prompts.get(slot or "")
        template = Template(self.tokenizer(slot), trained if system_prompt is None else system_prompt)
        return template.prompt_ids(conversation)

    def tokenizer(self, slot: str | None) -> Any:
        """The base's, with the tokens that `slot` has added."""
        from veneer.model.added_tokens import tokenizer_of

        return tokenizer_of(self.loaded, slot)


def open_model(settings: BaseSettings, adapters: Mapping[str, str]) -> Opened:
    """The base of the settings with every adapter (slot name -> folder) attached."""
    from veneer.adapter.attach import attach
    from veneer.adapter.card import Adapter
    from veneer.adapter.take import storage_note
    from veneer.model.load import load

    values = {name: Adapter.load(folder) for name, folder in adapters.items()}
    base = base_of(settings.base_model, list(adapters.values()))
    loaded = load(base, settings.dtype, storage=settings.storage)
    for name, adapter in values.items():
        if note := storage_note(adapter, loaded.storage, name):
            say(f"note: {note}")
        attach(loaded.model, adapter, name=name)
    prompts = {name: adapter.card.system_prompt for name, adapter in values.items()}
    for name, prompt in prompts.items():
        if prompt:
            say(f"{name} was trained with the system prompt: {_plain(prompt)}")
    return Opened(loaded, prompts)
