"""`veneer train`: data + base -> adapter folder, metrics, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.output import print_facts, print_json, say
from veneer.cli.parse import Command, Parsed, parse
from veneer.config import RunConfig
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.train.ranks import Ranks

COMMAND = Command(
    name="train",
    summary="data + base -> adapter folder, metrics, report",
    settings=RunConfig,
    switches={
        "resume": "go on from the last checkpoint in output_dir",
        "dry_run": "train nothing: tell parameters, memory and time, measured by steps that are thrown away",
        "no_progress": "no progress bar",
    },
    example="veneer train --base-model smollm2 --dataset train.jsonl --output-dir out/skill",
)


def run(argv: Sequence[str]) -> int:
    """Train, or tell what it would take."""
    parsed = _parsed(argv)
    from veneer.train.ranks import joined

    with joined() as ranks:
        return _measure(parsed, ranks) if "dry_run" in parsed.on else _train(parsed, ranks)


def _parsed(argv: Sequence[str]) -> Parsed[RunConfig]:
    """A run that is to go on needs all of its settings, which stand in its folder."""
    try:
        return parse(argv, COMMAND)
    except ConfigError as error:
        if "--resume" not in argv or any(word.endswith((".yaml", ".yml")) for word in argv):
            raise
        raise ConfigError(f"{error}\nA run goes on with: veneer train OUTPUT_DIR/run.yaml --resume") from None


def _measure(parsed: Parsed[RunConfig], ranks: Ranks) -> int:
    from veneer.train.dry_run import dry_run

    facts = dry_run(parsed.settings, progress="no_progress" not in parsed.on)
    if ranks.is_main:
        print_facts("dry run (nothing was trained)", facts, json=parsed.json)
        if parsed.json:
            print_json(facts)
    return 0


def _train(parsed: Parsed[RunConfig], ranks: Ranks) -> int:
    from veneer.evaluate.finetune import finetune

    config, progress = parsed.settings, "no_progress" not in parsed.on
    try:
        done = finetune(config, resume="resume" in parsed.on, progress=progress)
    except KeyboardInterrupt:
        if ranks.is_main:
            say("\n" + how_to_go_on(config.output_dir))
        raise
    if not ranks.is_main:
        return 0
    facts = done.training.to_json() | ({"address": done.address} if done.address else {})
    said = ("notes", "warnings") if progress else ()  # as they came up, beside the bar
    print_facts("trained", {name: fact for name, fact in facts.items() if name not in said}, json=parsed.json)
    say(f"next: veneer eval --adapter {config.output_dir} --dataset HELD_OUT.jsonl")
    if parsed.json:
        print_json(facts)
    return 0


def how_to_go_on(output_dir: str) -> str:
    """What an interrupted run left behind, and the command that uses it."""
    steps = [path.name.removeprefix("step-") for path in Path(output_dir, "checkpoints").glob("step-*")]
    numbers = sorted(int(step) for step in steps if step.isdigit())
    if not numbers:
        return "No checkpoint had been written, so there is nothing to resume; --save-steps N writes them more often."
    return f"The checkpoint of step {numbers[-1]} is kept. Go on with: veneer train {output_dir}/run.yaml --resume"
