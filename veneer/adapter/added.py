"""Tokens that an adapter adds to its base: a list of texts and ids on its card, applied to the base's own tokenizer.

No tokenizer is read from an adapter. The base's tables do not grow, and its tokenizer and fingerprint stay what they
are; the rows of the new ids are the adapter's (`veneer.methods.rows`), and each slot reads text in its own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.card import Adapter
from veneer.adapter.faults import add_fault
from veneer.adapter.peft_vocabulary import ADDED
from veneer.config import LoraSettings
from veneer.errors import ConfigError, listed
from veneer.model.added_tokens import OPTION, Extended, extended, known_faults
from veneer.model.swap import base_at
from veneer.model.vocabulary import embedding_path, head_path, is_tied

_NO_TOKENIZER = (
    "the tokens belong into a tokenizer, and this model came without one; next: load the base by veneer.load"
)


def added_from_settings(model: Any, settings: LoraSettings) -> Extended | None:
    """The tokenizer with the tokens of the settings. Raises ConfigError where base or tokenizer cannot have them."""
    if not settings.add_tokens:
        return None
    faults = _base_faults(model)
    if is_tied(model) and {embedding_path(model), head_path(model)} & _ends_in(settings.target_modules, model):
        faults.append("embedding and head share one weight (tied), and have factors; leave them out of target_modules")
    if not faults:
        faults += _gap(model, len(model.veneer_tokenizer))
    if faults:
        raise ConfigError(listed(f"{OPTION}:", faults, "Or train without it."))
    return extended(model.veneer_tokenizer, settings.add_tokens)


def _ends_in(targets: Any, model: nn.Module) -> set[str | None]:
    """Which of embedding and head are named as targets."""
    ends = [path for path in (embedding_path(model), head_path(model)) if path]
    return set() if isinstance(targets, str) else {e for e in ends for t in targets if e == t or e.endswith(f".{t}")}


def added_from_adapter(model: Any, adapter: Adapter) -> Extended | None:
    """The tokenizer with the tokens of an adapter that `unfit_added` finds no fault with."""
    told = adapter.card.settings.get(ADDED, [])
    return extended(model.veneer_tokenizer, [text for text, _ in told]) if told else None


def unfit_added(adapter: Adapter, model: Any) -> list[str]:
    """Why an adapter's added tokens do not fit this base and its tokenizer."""
    told = adapter.card.settings.get(ADDED, [])
    if not told or (faults := _base_faults(model)):
        return faults if told else []
    tokenizer, first = model.veneer_tokenizer, told[0][1]
    faults = [f"added token {fault}" for fault in known_faults(tokenizer, [text for text, _ in told])]
    if first != len(tokenizer):
        taken = f" (there {tokenizer.convert_ids_to_tokens(first)!r:.80})" if first < len(tokenizer) else ""
        faults.append(f"added tokens from id {first} on{taken}, the next free one of this base is {len(tokenizer)}")
    needed = [embedding_path(model), *([] if is_tied(model) else [head_path(model)])]
    add_fault(faults, "added tokens without rows", [str(path) for path in needed if path not in adapter.rows()])
    return faults or _gap(model, first)


def _base_faults(model: nn.Module) -> list[str]:
    """Why no tokens can be added to this base."""
    faults = [] if getattr(model, "veneer_tokenizer", None) is not None else [_NO_TOKENIZER]
    embedding, head = embedding_path(model), head_path(model)
    if embedding is None or head is None:
        return [*faults, "this model has no token embedding and vocabulary head that are known"]
    if base_at(model, head).bias is not None:
        faults.append(f"{head} has a bias, which would be of the new tokens too, and is not trained")
    return faults


def _gap(model: nn.Module, first: int) -> list[str]:
    rows = len(base_at(model, str(embedding_path(model))).weight)
    told = f"the tokenizer has {first} tokens, the embedding {rows} rows: some of its own have none"
    return [told] if first > rows else []


def new_rows(model: Any, path: str) -> Tensor:
    """Where the row (1, D) of an added token starts: at the mean of the rows of the tokenizer's own tokens, so that
    its logit is their mean too (Hewitt 2021, Initializing new word embeddings); float32, the same each time."""
    weight_VD = base_at(model, path).weight
    return weight_VD[: len(model.veneer_tokenizer)].mean(0, keepdim=True, dtype=torch.float32).cpu()


def about_added(ids: Mapping[str, int]) -> dict[str, Any]:
    """What a card's settings tell of added tokens."""
    return {ADDED: [[text, token] for text, token in ids.items()]} if ids else {}
