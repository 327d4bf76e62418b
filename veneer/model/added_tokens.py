"""Tokens that a tokenizer does not have, added to a copy of it: the base's own stays as it lies on disk.

They are plain added tokens, not special ones: matched in a text as they are spelt, and part of the text that comes
back. Their ids follow the tokenizer's last one, in the order given, whether or not the base's tables reach that far.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken

from veneer.errors import ConfigError, listed
from veneer.model.packed import wiring_of

OPTION = "--add-tokens"
MOST = 16384  # tokens
LONGEST = 256  # characters of one
_SHOWN = 8  # faults of a kind


class Extended(NamedTuple):
    """A tokenizer with added tokens, and their ids (text -> id, in the order of the ids)."""

    tokenizer: Any
    ids: Mapping[str, int]


def extended(tokenizer: Any, texts: Sequence[str]) -> Extended:
    """A copy of the tokenizer that has these texts as tokens. Raises ConfigError with every fault."""
    grown, first, ids, faults = copy.deepcopy(tokenizer), len(tokenizer), {}, spelling_faults(texts)
    if not faults:
        grown.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
        ids = {text: grown.convert_tokens_to_ids(text) for text in texts}
        altered = [_altered(grown, text, i) for text, i in ids.items() if grown.decode([i]) != text]
        faults = known_faults(tokenizer, texts) + _cut(altered)
    if faults:
        wanted = "Wanted words that the tokenizer does not have as one token, in letters that it gives back."
        raise ConfigError(listed(f"{OPTION}:", faults, wanted))
    if list(ids.values()) != list(range(first, first + len(ids))):
        raise ConfigError(f"{OPTION}: the ids of this tokenizer have gaps, so that new ones would not follow its last")
    return Extended(grown, ids)


def spelling_faults(texts: Sequence[Any]) -> list[str]:
    """What is wrong with texts as tokens, whatever the tokenizer."""
    if not 0 < len(texts) <= MOST:
        return [f"got {len(texts)} tokens, wanted 1 to {MOST}"]
    faults = [f"{text!r:.80}: {why}" for text in texts if (why := _misspelt(text))]
    if not faults and len(set(texts)) < len(texts):
        faults = [f"{text!r:.80}: given twice" for text in dict.fromkeys(texts) if list(texts).count(text) > 1]
    return _cut(faults)


def _misspelt(text: Any) -> str:
    if not isinstance(text, str):
        return "no text"
    if not text.strip():
        return "nothing but space"
    if len(text) > LONGEST:
        return f"{len(text)} characters, at most {LONGEST} are a token"
    return "" if text.isprintable() else "control characters, or others that cannot be seen"


def known_faults(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Texts that are a token already."""
    known = {text: found for text in texts if (found := _known_as(tokenizer, text)) is not None}
    told = "a token already; next: --trainable-token-indices"
    return _cut([f"{text!r}: {told} {found} trains its row" for text, found in known.items()])


def _known_as(tokenizer: Any, text: str) -> int | None:
    """The id of a text that is one token already."""
    found = tokenizer.encode(text, add_special_tokens=False)
    if len(found) == 1 and tokenizer.decode(found) == text:
        return int(found[0])
    return tokenizer.get_vocab().get(text)


def _altered(tokenizer: Any, text: str, token: int) -> str:
    return f"{text!r}: the tokenizer gives it back as {tokenizer.decode([token])!r}"


def _cut(faults: list[str]) -> list[str]:
    more = [f"{len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return faults[:_SHOWN] + more


def has_added(model: Any) -> bool:
    """Whether some slot has added tokens."""
    return bool(getattr(getattr(model, "veneer_wiring", None), "extended", None))


def added_by(model: Any, slot: str | None) -> Mapping[str, int]:
    """The tokens that a slot has added (text -> id); of the base, none."""
    return model.veneer_wiring.extended[slot].ids if has_added(model) and slot in model.veneer_wiring.extended else {}


def tokenizer_of(loaded: Any, slot: str | None) -> Any:
    """How the slot (None: the base) reads and writes text: the base's tokenizer, with what the slot has added.

    loaded: has `model` and `tokenizer`, as what `veneer.load` returns.
    """
    return wiring_of(loaded.model).extended[slot].tokenizer if added_by(loaded.model, slot) else loaded.tokenizer
