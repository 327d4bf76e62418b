"""The help text says what the settings say."""

from __future__ import annotations

import pytest

from veneer.cli import chat, convert, data, demo, generate, merge, push, train
from veneer.cli import eval as evaluation
from veneer.cli.help import help_text
from veneer.cli.parse import Command
from veneer.config import RunConfig, options_of

COMMANDS = [m.COMMAND for m in (train, evaluation, generate, chat, data, merge, convert, push, demo)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_every_option_is_there_and_fits(command: Command, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = help_text(command)
    lines = text.splitlines()
    for option in options_of(command.settings).values():
        name = option.name.replace("_", "-")
        words = f" [{'|'.join(option.words)}]" if option.words else ""
        shown = f"--[no-]{name}{words}" if option.kind == "flag" else f"--{name} {option.metavar}"
        assert sum(line == f"  {shown}" or line.startswith(f"  {shown}  ") for line in lines) == 1
        assert option.group in lines
        assert all(alias.replace("_", "-") in text for alias in option.aliases)
    for switch in command.all_switches:
        assert f"  --{switch.replace('_', '-')} " in text
    if columns == "80":
        assert max(map(len, lines[4:])) <= 80


def test_defaults_and_needs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    text = help_text(train.COMMAND)
    assert "rank of the update of each layer [16]" in text
    assert "added to the root of the second moment [1e-08]" in text
    assert "only where they are named [all-linear]" in " ".join(text.split())
    assert "keep the adapter of the lowest validation loss [yes]" in text
    assert text.count("(required)") == sum(option.required for option in options_of(RunConfig).values()) == 3
    assert "None" not in text
    assert "[]" not in text
