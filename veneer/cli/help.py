"""The text of `veneer VERB --help`, made from the settings class: names, types, defaults, descriptions."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from veneer.config import SHORTHANDS, Option, Settings, options_of

if TYPE_CHECKING:
    from veneer.cli.parse import Command

S = TypeVar("S", bound=Settings)
_INDENT = 34


def help_text(command: Command[S]) -> str:
    """All of it, as wide as the terminal up to 110 columns."""
    width = min(110, shutil.get_terminal_size().columns)
    options = options_of(command.settings)
    alone = [options[name] for name in (command.positional, command.second) if name]
    words = "".join(f" [{option.metavar}]" for option in alone)
    head = f"veneer {command.name}: {command.summary}\n\n"
    usage = f"usage: veneer {command.name} [FILE.yaml]{words} [--option value ...]\n"
    example = f"   e.g. {command.example}\n" if command.example else ""
    return head + usage + example + "\n" + "\n".join(_body(command, options, width))


def _body(command: Command[S], options: dict[str, Option], width: int) -> Iterator[str]:
    groups = dict.fromkeys([command.settings.group, *(option.group for option in options.values())])
    for group in groups:
        yield group
        for option in options.values():
            if option.group == group:
                yield from _entry(_left(option), _right(option), width)
        yield ""
    yield "This call"
    for name, text in {**command.all_switches, "help": "print this"}.items():
        yield from _entry("--" + name.replace("_", "-"), text, width)
    yield ""
    yield from textwrap.wrap(_spellings(options), width, break_on_hyphens=False)


def _entry(left: str, right: str, width: int) -> Iterator[str]:
    lines = textwrap.wrap(right, max(30, width - _INDENT), break_on_hyphens=False) or [""]
    fits = len(left) + 4 <= _INDENT
    if not fits:
        yield f"  {left}"
    for number, line in enumerate(lines):
        yield f"  {left if fits and number == 0 else '':<{_INDENT - 2}}{line}"


def _left(option: Option) -> str:
    name = option.name.replace("_", "-")
    if option.kind != "flag":
        return f"--{name} {option.metavar}"
    return f"--[no-]{name} [{'|'.join(option.words)}]" if option.words else f"--[no-]{name}"


def _right(option: Option) -> str:
    if option.required:
        return f"{option.help} (required)"
    default = _default(option.default)
    return f"{option.help} [{default}]" if default else option.help


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is None or value == {} else f"{value:g}" if isinstance(value, float) else str(value)


def _spellings(options: dict[str, Option]) -> str:
    spellings = [f"{', '.join(o.aliases)} = {name}" for name, o in options.items() if o.aliases]
    spellings += [f"{short} = {name} {value}" for short, (name, value) in SHORTHANDS.items() if name in options]
    other = "; ".join(spellings)
    file = "Options can stand in FILE.yaml as well (seed: 1); the command line wins. "
    return file + (f"Other spellings: {other.replace('_', '-')}." if other else "")
