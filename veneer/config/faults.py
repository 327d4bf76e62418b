"""From pydantic's errors to sentences for the person who typed the option."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from veneer.config.aliases import ADVICE
from veneer.config.options import Option, options_of, section_of
from veneer.errors import nearest

Spell = Callable[[str], str]
"""How an option is written where the user wrote it: `max_steps` or `--max-steps`."""


def sentences(settings: type[BaseModel], error: ValidationError, spell: Spell) -> list[str]:
    """One sentence an option; the branches of a union become 'wanted A or B'."""
    wanted: dict[tuple[str, str], list[str]] = {}
    done: list[str] = []
    for fault in error.errors(include_url=False):
        name, where = _locate(settings, fault["loc"])
        if fault["type"] == "missing":
            done.append(_missing(settings, name, spell))
        elif fault["type"] == "extra_forbidden":
            done.append(unknown(settings, name, spell))
        elif not name or _is_group(settings, name):  # of several options together: the sentence names them
            done.append(_spelt(fault["msg"], spell))
        else:
            wanted.setdefault((spell(name) + where, shown(fault["input"])), []).append(_want(fault["msg"]))
    return done + [f"{label}: got {got}, wanted {' or '.join(wants)}" for (label, got), wants in wanted.items()]


def _is_group(settings: type[BaseModel], name: str) -> bool:
    field = settings.model_fields.get(name)
    return field is not None and section_of(field) is not None


def unknown(settings: type[BaseModel], name: str, spell: Spell, others: Iterable[str] = ()) -> str:
    """The sentence for an option that does not exist. `others`: switches that are not settings."""
    if name in ADVICE:
        return f"{spell(name)}: {_spelt(ADVICE[name], spell)}"
    if name in settings.model_fields:
        return f"{spell(name)} is a group of options; write each at the top level: {_members(settings, name)}"
    near = _nearest(name, options_of(settings).values(), others)
    hint = f"; did you mean {' or '.join(map(spell, near))}?" if near else ""
    return f"unknown option {spell(name)}{hint}"


def shown(value: Any) -> str:
    """A value as the user would write it, short."""
    bare = isinstance(value, str) and value.isprintable() and value.strip() == value and bool(value)
    text = str(value) if bare else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _locate(settings: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, str]:
    """pydantic's location -> (option, place inside its value); the option is '' for the settings as a whole."""
    level = settings
    for depth, part in enumerate(loc):
        field = level.model_fields.get(str(part))
        section = section_of(field) if field else None
        if section is None or depth == len(loc) - 1:
            return str(part), _inside(loc[depth + 1 :])
        level = section
    return "", ""


def _inside(rest: tuple[int | str, ...]) -> str:
    # Union branches show up as 'list[str]' or "literal['all-linear']": names of ours, not places in the value.
    places = [str(part) for part in rest if not (isinstance(part, str) and ("[" in part or part in _TYPES))]
    return f"[{places[0]}]" if places else ""


def _spelt(text: str, spell: Spell) -> str:
    """Options stand between backticks in texts of our own; here they get the spelling of the reader."""
    return re.sub(r"`(\w+)`", lambda found: spell(found[1]), text)


def _want(message: str) -> str:
    text = message.removeprefix("Input should be ").removeprefix("Input should ")
    text = re.sub(r"^\w+ should have (.*) after validation, not \d+$", r"\1", text)
    for ours, theirs in _WORDS.items():
        if text.startswith(theirs):
            return ours
    return f"a value {text}" if text.startswith(("greater", "less")) else text


def _missing(settings: type[BaseModel], name: str, spell: Spell) -> str:
    option = options_of(settings).get(name)
    needed = [option] if option else [o for o in options_of(settings).values() if o.path[0] == name and o.required]
    return "; ".join(f"{spell(o.name)} is missing: {o.help}" for o in needed)


def _members(settings: type[BaseModel], section: str) -> str:
    return ", ".join(name for name, option in options_of(settings).items() if option.path[0] == section)


def _nearest(name: str, options: Iterable[Option], others: Iterable[str]) -> list[str]:
    """Options that begin like `name`, else the one most like it: compared by every spelling, told by their own."""
    spellings = {other: other for other in others}
    for option in options:
        spellings |= dict.fromkeys((option.name, *option.aliases), option.name)
    begun = [own for own in dict.fromkeys(spellings.values()) if own.startswith(name)]
    return begun[:3] or [spellings[near] for near in nearest(name, spellings, 1)]


_TYPES = {"int", "float", "str", "bool"}
_WORDS = {
    "a whole number": "a valid integer",
    "a number": "a valid number",
    "true or false": "a valid boolean",
    "text": "a valid string",
    "a list": "a valid list",
    "name=value pairs": "a valid dictionary",
}
