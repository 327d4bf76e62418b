"""From words on the command line to settings; the settings class is the only list of options."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from veneer.cli.help import help_text
from veneer.cli.output import results
from veneer.config import SHORTHANDS, Option, Settings, options_of, read, read_yaml
from veneer.config.faults import unknown
from veneer.config.values import files_named

S = TypeVar("S", bound=Settings)
_SHORT = {"-o": "--output"}
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_YES_NO = {"true", "false", "yes", "no", "on", "off"}


@dataclass(frozen=True)
class Command(Generic[S]):
    """A verb as the parser sees it.

    positional: the option that words alone fill; where it takes one word, `second` is filled by the next. switches:
    what to do, not how, so never in a YAML file; name -> help. read_file: FILE.yaml -> options.
    """

    name: str
    summary: str
    settings: type[S]
    positional: str | None = None
    second: str | None = None
    switches: dict[str, str] = field(default_factory=dict)
    example: str = ""
    read_file: Callable[[str], Mapping[str, Any]] = read_yaml

    @property
    def all_switches(self) -> dict[str, str]:
        """The verb's own switches and those of every verb."""
        return {**self.switches, "json": "print one JSON object on standard output, the rest on standard error"}


@dataclass(frozen=True)
class Parsed(Generic[S]):
    """What the user asked for."""

    settings: S
    on: frozenset[str]
    """The switches that are on."""

    @property
    def json(self) -> bool:
        """Whether the result is to be one JSON object."""
        return "json" in self.on


def parse(argv: Sequence[str], command: Command[S]) -> Parsed[S]:
    """Settings and switches. `--help` prints and exits 0; ConfigError lists every fault of files and command line."""
    words = list(argv)
    if {"--help", "-h"} & set(words[: words.index("--")] if "--" in words else words):
        print(help_text(command), file=results())
        raise SystemExit(0)
    line = _Line(command)
    line.take(deque(words))
    files = [command.read_file(path) for path in line.files]
    settings = read(command.settings, *files, line.options, spell=kebab, faults=line.faults)
    return Parsed(settings, frozenset(name for name, on in line.switches.items() if on))


def kebab(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


class _Line:
    """One command line, word by word: options and switches under their own names, files, faults."""

    def __init__(self, command: Command[S]) -> None:
        self.command = command
        self.known = {s: o for o in options_of(command.settings).values() for s in (*o.aliases, o.name)}
        self.options: dict[str, str] = {}
        self.switches: dict[str, bool] = {}
        self.files: list[str] = []
        self.faults: list[str] = []
        self.open: str | None = None  # the list that a word without an option of its own goes on with

    def take(self, words: deque[str]) -> None:
        while words:
            word = words.popleft()
            if word == "--":
                self._positional(words.popleft() for _ in range(len(words)))
            elif word.startswith("--"):
                self._option(word, words)
            elif word in _SHORT and _SHORT[word].lstrip("-") in self.known:
                self._option(_SHORT[word], words)
            elif word.startswith("-") and word != "-" and not _is_number(word):
                self.faults.append(self._single_dash(word, words))
            else:
                self._positional([word])

    def _option(self, word: str, words: deque[str]) -> None:
        self.open = None
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        positive = name.removeprefix("no_")
        negated = name not in self.known and positive != name and self._is_flag(positive)
        if self._is_flag(positive if negated else name):
            flag = positive if negated else name
            chooses = bool(self._words(flag)) and not negated  # then a word that follows is meant as one of them
            follows = words and (words[0].lower() in _YES_NO or (chooses and not _starts_something_else(words[0])))
            text = value if equals else words.popleft() if follows else "true"
            self._flag(flag, text, negated)
        elif equals or (words and not words[0].startswith("--")):
            self._set(name, value if equals else words.popleft())
        else:
            self.faults.append(self._unknown(name) if name not in self.known else f"{kebab(name)} needs a value")

    def _flag(self, name: str, text: str, negated: bool) -> None:
        on = (text.lower() in ("true", "yes", "on", "1")) != negated
        if text.lower() in self._words(name) and not negated:
            self._set(name, text.lower())
        elif text.lower() not in _YES_NO | {"0", "1"}:
            wanted = " or ".join(("true", "false", *self._words(name)))
            self.faults.append(f"{kebab(name)}: got {text}, wanted {wanted}")
        elif name in self.known:
            self._set(name, str(on).lower())
        elif name in SHORTHANDS:
            if on:
                self._set(*SHORTHANDS[name])
        else:
            self.switches[name] = on

    def _set(self, name: str, value: str) -> None:
        option = self.known.get(name)
        self.open = name if option and option.kind == "list" else None
        if option is None:
            self.faults.append(self._unknown(name))
        elif option.name not in self.options:
            self.options[option.name] = value
        elif option.kind == "dict":
            self.options[option.name] += "," + value
        elif option.kind == "list":
            self.options[option.name] = _joined(self.options[option.name], value)
        elif self.options[option.name] != value:
            self.faults.append(f"{kebab(option.name)} is given twice: {self.options[option.name]} and {value}")

    def _positional(self, words: Iterable[str]) -> None:
        for word in words:
            if word.endswith((".yaml", ".yml")):
                self.files.append(word)
            elif self.open and (_is_number(word) or self._is_next_file(word) or not self.command.positional):
                self._set(self.open, word)
            elif self.command.positional:
                first, second = self.command.positional, self.command.second
                self._set(second if second and first in self.options else first, word)
            else:
                hint = f"; did you mean --dataset {word}?" if "dataset" in self.known and word.endswith(_DATA) else ""
                self.faults.append(f"{word} stands alone; every value follows its --option, but for FILE.yaml{hint}")

    def _is_next_file(self, word: str) -> bool:
        """Whether the word goes on with data files, where words alone are something else."""
        return self.known[str(self.open)].name == "dataset" and (word.endswith(_DATA) or word.startswith("hub:"))

    def _is_flag(self, name: str) -> bool:
        option: Option | None = self.known.get(name)
        stands_for = SHORTHANDS.get(name, ("", ""))[0]
        return option.kind == "flag" if option else name in self.command.all_switches or stands_for in self.known

    def _words(self, name: str) -> tuple[str, ...]:
        option: Option | None = self.known.get(name)
        return option.words if option else ()

    def _unknown(self, name: str) -> str:
        return unknown(self.command.settings, name, kebab, self.command.all_switches)

    def _single_dash(self, word: str, words: deque[str]) -> str:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        if name not in self.known:
            return f"unknown option {word}"
        if words and not words[0].startswith("-"):
            words.popleft()
        return f"unknown option {word}; write {kebab(name)}"


def _starts_something_else(word: str) -> bool:
    return word.startswith("-") or word.endswith((".yaml", ".yml"))


def _joined(given: str, more: str) -> str:
    """Two words of one list as one; in JSON where either is, or where a comma is part of a name."""
    names = [name for word in (given, more) for name in files_named(word)]
    in_json = any(word.lstrip().startswith("[") for word in (given, more))
    return json.dumps(names) if in_json or any("," in name for name in names) else f"{given},{more}"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
