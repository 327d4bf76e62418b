"""The base of all settings, and the way from flat options (command line, YAML) to settings and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from veneer.config.aliases import SHORTHANDS
from veneer.config.faults import Spell, sentences, shown, unknown
from veneer.config.options import allows_none, kind_of, options_of
from veneer.errors import ConfigError, listed

S = TypeVar("S", bound="Settings")
HEADLINE = "these settings cannot be used:"


class Settings(BaseModel):
    """Frozen, typed, no unknown names, no NaN or infinity. A bad value raises ConfigError with every fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)
    group: ClassVar[str] = "Options"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(listed(HEADLINE, sentences(type(self), error, str))) from None

    # Tells pydantic that this is its own __init__ with another error: otherwise it would call it for every section
    # and wrap our ConfigError in a ValidationError, losing which option was wrong.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, str) and value.lower() in ("none", "null") and allows_none(field):
            return None
        if isinstance(value, bool) and kind_of(field) in ("int", "float"):
            raise PydanticCustomError("number", "Input should be a number, not true or false")
        return value

    @classmethod
    def from_flat(cls: type[S], options: Mapping[str, Any]) -> S:
        """Settings from options at the top level under any accepted spelling. ConfigError lists all faults."""
        return read(cls, options)

    def to_flat(self) -> dict[str, Any]:
        """Every option under its own name; `from_flat` of it gives equal settings."""
        dumped = self.model_dump()
        return {name: _at(dumped, option.path) for name, option in options_of(type(self)).items()}


def read(cls: type[S], *sources: Mapping[str, Any], spell: Spell = str, faults: Iterable[str] = ()) -> S:
    """Settings from several sources, the last wins. `faults` found before are told together with those found here."""
    found = list(faults)
    merged: dict[str, Any] = {}
    for source in sources:
        merged |= _canonical(cls, source, spell, found)
    try:
        settings = cls.model_validate(_nested(cls, merged))
    except ValidationError as error:
        found += sentences(cls, error, spell)
    if found:
        raise ConfigError(listed(HEADLINE, found))
    return settings


def _canonical(cls: type[Settings], source: Mapping[str, Any], spell: Spell, faults: list[str]) -> dict[str, Any]:
    """The source under our own names. Unknown names, and two values for one option, are added to `faults`."""
    options = options_of(cls)
    own = {spelling: name for name, option in options.items() for spelling in (*option.aliases, name)}
    result: dict[str, Any] = {}
    for key, (spelling, value) in _longhand(source, options):
        name = own.get(spelling)
        if name is None:
            faults.append(unknown(cls, spelling, spell))
        elif name in result and result[name] != value:
            faults.append(f"{spell(name)} is given twice: {shown(result[name])} and, as {key}, {shown(value)}")
        else:
            result[name] = value
    return result


def _longhand(source: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Each key as it is written, and what it says: `fp16: true` is a value of `dtype`, `fp16: false` nothing."""
    for key, value in source.items():
        spelling = str(key).replace("-", "_")
        said = str(value).lower() if isinstance(value, (bool, str)) else ""  # a list's text may be gigabytes
        name, meant = SHORTHANDS.get(spelling, (spelling, value))
        if name == spelling or name not in options:
            yield str(key), (spelling, value)
        elif said != "false":  # what is neither true nor auto is refused by the option's own type
            yield str(key), (name, {"true": meant, "auto": "auto"}.get(said, value))


def _nested(cls: type[Settings], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat options -> the nesting of the class; every section is there, so that each tells what it misses."""
    nested: dict[str, Any] = {o.path[0]: {} for o in options_of(cls).values() if len(o.path) > 1}
    for name, value in flat.items():
        path = options_of(cls)[name].path
        (nested if len(path) == 1 else nested[path[0]])[path[-1]] = value
    return nested


def _at(dumped: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        dumped = dumped[part]
    return dumped
