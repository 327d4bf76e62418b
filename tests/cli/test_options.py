"""The options of every verb are a promise: one added, renamed, removed or with another default fails here."""

from __future__ import annotations

import os
from pathlib import Path

from veneer.cli import chat, convert, data, demo, generate, inspect, merge, push, train
from veneer.cli import eval as evaluation
from veneer.config import options_of

FROZEN = Path(__file__).with_name("options.txt")
UPDATE = "VENEER_UPDATE=1 python -m pytest tests/cli/test_options.py"
COMMANDS = [m.COMMAND for m in (train, evaluation, generate, chat, data, merge, convert, inspect, push, demo)]


def current() -> str:
    lines = []
    for command in COMMANDS:
        for name, option in options_of(command.settings).items():
            default = "required" if option.required else repr(option.default)
            lines.append(f"{command.name} --{name} {option.metavar or 'flag'} = {default}")
        lines += [f"{command.name} --{name} switch" for name in command.all_switches]
    return "\n".join(lines) + "\n"


def test_options_are_the_frozen_ones() -> None:
    if os.environ.get("VENEER_UPDATE"):
        FROZEN.write_text(current(), encoding="utf-8")
    now, frozen = current().splitlines(), FROZEN.read_text(encoding="utf-8").splitlines()
    changes = [f"+ {line}" for line in now if line not in frozen] + [f"- {line}" for line in frozen if line not in now]
    assert now == frozen, "\n".join(["the options changed; if that is meant, run", f"  {UPDATE}", *changes])
