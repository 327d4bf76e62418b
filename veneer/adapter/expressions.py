"""Regular expressions of somebody else's, matched in bounded time.

Python's matcher tries one way after another, and there can be 2^60 of them. Here all ways go on together: a match is
the set of places where it could have got to (Thompson 1968, doi 10.1145/363347.363387), so `(a+)+b` is as quick as
`a+b`. What is left to fear, repeats of repeats of repeats, ends when an allowance of steps is used up.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

try:
    from re import _constants as _codes  # type: ignore[attr-defined]
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _codes
    import sre_parse as _parser

STEPS = 2_000_000  # a few seconds
_LONGEST = 20_000  # characters of one expression: parsing takes a microsecond or two for each

_CHARACTERS = {_codes.LITERAL, _codes.NOT_LITERAL, _codes.ANY, _codes.IN}
_REPEATS = {_codes.MAX_REPEAT, _codes.MIN_REPEAT}
_LOOKAHEAD = {_codes.ASSERT, _codes.ASSERT_NOT}
_CATEGORIES = {
    _codes.CATEGORY_DIGIT: str.isdecimal,
    _codes.CATEGORY_SPACE: str.isspace,
    _codes.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    _codes.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    _codes.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    _codes.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}


class TooCostly(ValueError):
    """A pattern that is not a regular expression of the plain kind, or would take too long to match."""


class Work:
    """An allowance of steps that several expressions share."""

    def __init__(self, steps: int = STEPS) -> None:
        self.left = steps

    def spend(self, steps: int, source: str) -> None:
        """Raises TooCostly once nothing is left."""
        self.left -= steps
        if self.left < 0:
            raise TooCostly(f"{source[:80]!r} could take too long to match")


class Expression:
    """A regular expression as `re` reads it, but for flags, back references, lookbehind, and atomic groups.

    Raises TooCostly for those, for what is no expression, and when its work is used up.
    """

    def __init__(self, source: str, work: Work) -> None:
        self.source, self.work = source, work
        if len(source) > _LONGEST:
            raise TooCostly(f"{source[:80]!r}... has {len(source)} characters, at most {_LONGEST} are read")
        work.spend(10 * len(source), source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about spellings that a later Python may read otherwise
                self.tree = _parser.parse(source)
            if self.tree.state.flags & ~re.UNICODE:
                raise re.error("flags are not accepted")
            _check(self.tree)
            self.shortest, self.longest = self.tree.getwidth()
        except (re.error, RecursionError, OverflowError) as error:
            raise TooCostly(f"{source[:80]!r} is not a regular expression that is understood ({error})") from error

    def matches(self, text: str, starts: Iterable[int]) -> bool:
        """Whether all of the text from one of the starts on is a match."""
        self.work.spend(1, self.source)
        fitting = {start for start in starts if self.shortest <= len(text) - start <= self.longest}
        try:
            return len(text) in self._ends(self.tree, text, fitting)
        except RecursionError as error:
            raise TooCostly(f"{self.source[:80]!r} is nested too deeply") from error

    def _ends(self, tree: Any, text: str, starts: set[int]) -> set[int]:
        """Where matches that begin at one of the starts can end."""
        for code, argument in tree:
            if not starts:
                break
            self.work.spend(len(starts), self.source)
            starts = self._step(code, argument, text, starts)
        return starts

    def _step(self, code: Any, argument: Any, text: str, starts: set[int]) -> set[int]:
        if code in _CHARACTERS:
            return {at + 1 for at in starts if at < len(text) and _accepts(code, argument, text[at])}
        if code is _codes.AT:
            return {at for at in starts if _is_at(argument, text, at)}
        if code is _codes.BRANCH:
            return set().union(*(self._ends(branch, text, starts) for branch in argument[1]))
        if code is _codes.SUBPATTERN:
            return self._ends(argument[-1], text, starts)
        if code in _REPEATS:
            low, high, body = argument
            return self._repeated(int(low), int(high), body, text, starts)
        wanted = code is _codes.ASSERT
        return {at for at in starts if bool(self._ends(argument[1], text, {at})) is wanted}

    def _repeated(self, low: int, high: int, body: Any, text: str, starts: set[int]) -> set[int]:
        """More rounds than characters change nothing: one of them would match nothing, and could be left out."""
        low, high = min(low, len(text) + 1), min(high, len(text) + 1)
        for _ in range(low):
            starts = self._ends(body, text, starts)
        reached = starts
        for _ in range(high - low):
            starts = self._ends(body, text, starts) - reached
            if not starts:
                break
            reached = reached | starts
        return reached


def _check(tree: Any) -> None:
    """Raise re.error for the first thing in a tree that is not accepted."""
    for code, argument in tree:
        if code is _codes.BRANCH:
            inner = argument[1]
        elif code is _codes.SUBPATTERN:
            _, added, removed, body = argument
            if added or removed:
                raise re.error("flags are not accepted")
            inner = [body]
        elif code in _REPEATS or (code in _LOOKAHEAD and argument[0] > 0):
            inner = [argument[-1]]
        elif code in _CHARACTERS or code is _codes.AT:
            inner = []
        else:
            raise re.error(f"{str(code).lower()} is not accepted")
        for part in inner:
            _check(part)


def _accepts(code: Any, argument: Any, char: str) -> bool:
    if code is _codes.LITERAL:
        return ord(char) == argument
    if code is _codes.NOT_LITERAL:
        return ord(char) != argument
    return char != "\n" if code is _codes.ANY else _is_in(argument, char)


def _is_in(items: Collection[tuple[Any, Any]], char: str) -> bool:
    """Whether a set such as [a-z\\d] has the character."""
    found = negated = False
    for code, argument in items:
        if code is _codes.NEGATE:
            negated = True
        elif code is _codes.RANGE:
            found = found or argument[0] <= ord(char) <= argument[1]
        elif code is _codes.CATEGORY:
            found = found or _CATEGORIES[argument](char)
        else:
            found = found or ord(char) == argument
    return found is not negated


def _is_at(where: Any, text: str, at: int) -> bool:
    if where in (_codes.AT_BEGINNING, _codes.AT_BEGINNING_STRING):
        return at == 0
    if where is _codes.AT_END:
        return at == len(text) or text[at:] == "\n"
    if where is _codes.AT_END_STRING:
        return at == len(text)
    is_word = _CATEGORIES[_codes.CATEGORY_WORD]
    is_edge = (at > 0 and is_word(text[at - 1])) is not (at < len(text) and is_word(text[at]))
    return is_edge is (where is _codes.AT_BOUNDARY)
