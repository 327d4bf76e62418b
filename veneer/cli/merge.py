"""`veneer merge --into-base`: an adapter becomes part of its base, with a report of the rounding error."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.cli.load import base_of
from veneer.cli.output import print_facts, print_json, say
from veneer.cli.parse import Command, parse
from veneer.config import MergeSettings

COMMAND = Command(
    name="merge",
    summary="an adapter into its base -> a model folder that transformers loads, with an error report",
    settings=MergeSettings,
    positional="adapters",
    example="veneer merge out/skill --into-base --output out/model",
)


def run(argv: Sequence[str]) -> int:
    """Merge and print the error report."""
    parsed = parse(argv, COMMAND)
    settings = parsed.settings
    from veneer.merge.into_base import merge_into_base

    [folder] = settings.adapters
    base = base_of(settings.base_model, settings.adapters)
    report = merge_into_base(folder, base, settings.output, settings.dtype).to_json()
    print_facts(f"{folder} in {base} -> {settings.output}", report, json=parsed.json)
    say(f"next: veneer generate --base-model {settings.output} --prompt TEXT")
    if parsed.json:
        print_json(report)
    return 0
