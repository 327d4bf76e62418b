"""What options a settings class has: the one table that help, parsing and the YAML file read.

A field whose type is a settings class is a section: its fields are options of the whole, at the top level.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from veneer.config.aliases import ALIASES
from veneer.config.values import Metavar

Kind = Literal["flag", "int", "float", "str", "list", "dict"]


@dataclass(frozen=True)
class Option:
    """One setting as the user meets it. `path` leads to it: (section, name) or (name,)."""

    name: str
    path: tuple[str, ...]
    group: str
    kind: Kind
    metavar: str
    help: str
    default: Any
    required: bool
    aliases: tuple[str, ...]
    words: tuple[str, ...] = ()  # what a flag may be beside true and false


@functools.cache
def options_of(settings: type[BaseModel]) -> dict[str, Option]:
    """Name -> option, in the order of declaration, sections opened."""
    found = list(_walk(settings, ()))
    return {path[-1]: _option(path, field, group) for path, field, group in found}


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The settings class of a field that is a section, else None."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _walk(settings: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], FieldInfo, str]]:
    for name, field in settings.model_fields.items():
        section = section_of(field)
        if section is None:
            yield (*path, name), field, _group(settings, name)
        else:
            yield from _walk(section, (*path, name))


def _group(settings: type[BaseModel], name: str) -> str:
    """Title of the oldest class that has the field: a subclass that only narrows it does not move it."""
    owner = next(c for c in reversed(settings.__mro__) if issubclass(c, BaseModel) and name in c.model_fields)
    return str(getattr(owner, "group", owner.__name__))


def _option(path: tuple[str, ...], field: FieldInfo, group: str) -> Option:
    name = path[-1]
    aliases = tuple(alias for alias, targets in ALIASES.items() if name in targets)
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    kind = kind_of(field)
    metavar = next((m.text for m in field.metadata if isinstance(m, Metavar)), None) or _metavar(field.annotation)
    words = tuple(word for member in _members(field.annotation) for word in _words(member)) if kind == "flag" else ()
    return Option(
        name, path, group, kind, metavar, field.description or "", default, field.is_required(), aliases, words
    )


def kind_of(field: FieldInfo) -> Kind:
    """How a value of the field is written: the first type of a union that is more than text wins."""
    kinds = [_kind(member) for member in _members(field.annotation)]
    return next((kind for kind in kinds if kind != "str"), "str")


def allows_none(field: FieldInfo) -> bool:
    """Whether the option can be given as `none`."""
    return type(None) in _members(field.annotation)


def _kind(annotation: Any) -> Kind:
    plain = get_origin(annotation) or annotation
    return _KINDS.get(plain, "str")


def _words(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _metavar(annotation: Any) -> str:
    """The innermost Metavar, the words of a Literal, or the letter of the kind."""
    if get_origin(annotation) is Annotated:
        named = [m.text for m in get_args(annotation)[1:] if isinstance(m, Metavar)]
        return named[0] if named else _metavar(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in _UNIONS:
        return next(_metavar(a) for a in get_args(annotation) if a is not type(None))
    return _LETTERS[_kind(annotation)]


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in _UNIONS:
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


_UNIONS = (Union, types.UnionType)
_KINDS: dict[Any, Kind] = {bool: "flag", int: "int", float: "float", list: "list", dict: "dict"}
_LETTERS: dict[Kind, str] = {"flag": "", "int": "N", "float": "X", "str": "TEXT", "list": "A,B,...", "dict": "K=V,..."}
