"""PEFT's patterns: which rank and alpha a module has, which modules a target names.

A pattern key is a regular expression that must match the end of a module path, at a dot. It comes from a file that
somebody else wrote, and `(a+)+b` can keep Python's matcher busy for ever; so the number of ways in which a pattern
can match is bounded before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

try:
    from re import _constants as _codes  # type: ignore[attr-defined]
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _codes
    import sre_parse as _parser

Value = TypeVar("Value")

WORK = 100_000_000  # ways to match, over all modules
_LONGEST = 5_000_000  # characters
_SINGLE = {_codes.LITERAL, _codes.NOT_LITERAL, _codes.ANY, _codes.IN, _codes.AT}


class TooCostly(ValueError):
    """A pattern that is not a regular expression, or could take too long to match."""


def resolve(patterns: Mapping[str, Value], modules: Sequence[str], default: Value) -> dict[str, Value]:
    """The value of each module: that of the first pattern that matches, else `default`. PEFT's `get_pattern_key`.

    Raises TooCostly.
    """
    _check(list(patterns), modules)
    compiled = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]
    return {
        module: next((value for pattern, value in compiled if pattern.match(module)), default) for module in modules
    }


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
        _check([targets], modules)
        return [module for module in modules if re.fullmatch(targets, module)]
    ends = tuple(f".{target}" for target in targets)
    return [module for module in modules if module in targets or module.endswith(ends)]


def matched(pattern: str, modules: Sequence[str]) -> list[str]:
    """The modules that one word of a list names: by whole path, by last parts, or as an expression over either.

    Raises TooCostly.
    """
    literal = [module for module in modules if module == pattern or module.endswith(f".{pattern}")]
    if literal:
        return literal
    _check([pattern], modules)
    expression = re.compile(rf"(.*\.)?({pattern})$")
    return [module for module in modules if expression.match(module)]


def _check(patterns: Sequence[str], modules: Sequence[str]) -> None:
    """Raise TooCostly for the patterns that are no expressions or together could exceed WORK."""
    longest = max(map(len, modules), default=0)
    ways = 0
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            raise TooCostly(f"a pattern of {len(pattern)} characters")
        try:
            ways += _ways(_parser.parse(pattern), longest)
        except (re.error, RecursionError, OverflowError) as error:
            raise TooCostly(f"{pattern[:80]!r} is not a regular expression that is understood ({error})") from error
        if ways * len(modules) > WORK:
            raise TooCostly(f"{pattern[:80]!r} could take too long to match")


def _ways(expression: Any, longest: int) -> int:
    """An upper bound of the ways in which an expression can match names of up to `longest` characters."""
    ways = 1
    for code, argument in expression:
        if code in _SINGLE:
            continue
        if code is _codes.BRANCH:
            ways *= sum(_ways(branch, longest) for branch in argument[1])
        elif code is _codes.SUBPATTERN:
            ways *= _ways(argument[-1], longest)
        elif code in (_codes.MAX_REPEAT, _codes.MIN_REPEAT):
            low, high, body = argument
            ways *= _ways_of_repeat(low, int(high), body, longest)
        else:
            raise re.error(f"{code} is not accepted")
        ways = min(ways, WORK + 1)  # keeps the integers small
    return ways


def _ways_of_repeat(low: int, high: int, body: Any, longest: int) -> int:
    once = _ways(body, longest)
    times = range(min(low, longest), min(high, longest) + 1)
    if body.getwidth()[0] == 0 and len(times) > 1 and high > 1:
        once += 1  # a body that may be empty
    if once > 1 and times.stop > 64:
        return WORK + 1
    return sum(once**count for count in times)
