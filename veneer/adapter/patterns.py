"""PEFT's patterns: which rank and alpha a module has, which modules a target names.

A pattern key is a regular expression that must match the end of a module path, at a dot. It comes from a file that
somebody else wrote, and `(a+)+b` can keep Python's matcher busy for ever; so patterns never reach it. Names, and
choices of names as `exact` writes them, are looked up; anything else is matched by `veneer.adapter.expressions`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from veneer.adapter.expressions import Expression, TooCostly, Work

__all__ = ["TooCostly", "exact", "matched", "named", "resolve"]

Value = TypeVar("Value")

_NAME = re.compile(r"(?:[A-Za-z0-9_.-]|\\[.-])+")  # a name, or as `re.escape` writes it; one way to match: always fast
_ANY = "\n"  # no module has it in its name
_Names = dict[tuple[int, ...], dict[str, int]]  # where anything may stand -> name -> index of the first such key


def resolve(patterns: Mapping[str, Value], modules: Sequence[str], default: Value) -> dict[str, Value]:
    """The value of each module: that of the first pattern that matches, else `default`. PEFT's `get_pattern_key`.

    Raises TooCostly.
    """
    found, values = _Patterns(list(patterns)), list(patterns.values())
    first = {module: found.first(module) for module in modules}
    return {module: default if index is None else values[index] for module, index in first.items()}


def exact(modules: Sequence[str]) -> str:
    """The pattern that matches these module paths and no other.

    `^` is the trap's remedy: without it `layers.1.q_proj` also means `vision.layers.1.q_proj`. One pattern for many
    modules, because PEFT compiles each key anew for each module once there are more than Python's cache of 512.
    """
    names = [re.escape(module) for module in sorted(modules)]
    return f"^{names[0]}" if len(names) == 1 else f"^(?:{'|'.join(names)})"


def named(targets: str | Sequence[str], modules: Sequence[str]) -> list[str]:
    """The modules that PEFT's `target_modules` or `exclude_modules` mean: a list of path ends, or one expression.

    Raises TooCostly.
    """
    if isinstance(targets, str):
        expression = Expression(targets, Work())
        return [module for module in modules if expression.matches(module, [0])]
    wanted = set(targets)
    return [module for module in modules if not wanted.isdisjoint(_ends(module))]


def matched(pattern: str, modules: Sequence[str]) -> list[str]:
    """The modules that one word of a list names: by whole path, by last parts, or as an expression over either.

    Raises TooCostly.
    """
    literal = [module for module in modules if module == pattern or module.endswith(f".{pattern}")]
    if literal:
        return literal
    found = _Patterns([pattern])
    return [module for module in modules if found.first(module) is not None]


class _Patterns:
    """Pattern keys in their order; one allowance of work for all of them. Raises TooCostly."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.work = Work()
        self.wholes: _Names = {}  # those that mean one path
        self.ends: _Names = {}  # those that mean all paths that end so
        self.expressions: list[tuple[int, Expression]] = []
        for index, key in enumerate(keys):
            is_whole, names = _names(key)
            if not names:
                self.expressions.append((index, Expression(key, self.work)))
            for name in names:
                any_at = tuple(at for at, char in enumerate(name) if char == _ANY)
                (self.wholes if is_whole else self.ends).setdefault(any_at, {}).setdefault(name, index)

    def first(self, module: str) -> int | None:
        """The index of the first key that matches the module."""
        ends = _ends(module)
        known = [*self._known(self.wholes, module), *(index for end in ends for index in self._known(self.ends, end))]
        starts = [len(module) - len(end) for end in ends]
        for index, expression in self.expressions:
            if known and index > min(known):
                break
            if expression.matches(module, starts):
                return index
        return min(known, default=None)

    def _known(self, names: _Names, text: str) -> Iterator[int]:
        """The indices of the keys that are this text, but for the places where anything may stand."""
        self.work.spend(len(names), text)
        for any_at, indices in names.items():
            if not any_at or any_at[-1] < len(text):
                chars = list(text)
                for at in any_at:
                    chars[at] = _ANY
                if (index := indices.get("".join(chars))) is not None:
                    yield index


def _ends(module: str) -> list[str]:
    """The path and what follows each of its dots."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _names(key: str) -> tuple[bool, list[str]]:
    """Whether the key means whole paths only, and the names that it consists of; none where it is more than that.

    A bare dot stands for any character: it becomes _ANY.
    """
    body = key.removeprefix("^")
    is_group = body.startswith("(?:") and body.endswith(")")
    names = (body[3:-1] if is_group else body).split("|")
    if not all(_NAME.fullmatch(name) for name in names) or (body != key and len(names) > 1 and not is_group):
        return False, []  # `^a|b` means `^a` or any end in b
    bare = [name.replace("\\.", "\\").replace(".", _ANY).replace("\\-", "-").replace("\\", ".") for name in names]
    return body != key, bare
