"""`veneer push`: an adapter folder, with its model card, to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.cli.output import print_facts, print_json
from veneer.cli.parse import Command, parse
from veneer.config import PushSettings

COMMAND = Command(
    name="push",
    summary="an adapter folder, with its model card, to the Hugging Face Hub",
    settings=PushSettings,
    positional="adapter",
    example="veneer push out/skill --hub-model-id me/skill",
)


def run(argv: Sequence[str]) -> int:
    """Upload and say where it is."""
    parsed = parse(argv, COMMAND)
    settings = parsed.settings
    from veneer.evaluate.publish import publish

    facts = {"adapter": settings.adapter, "address": publish(settings.adapter, settings)}
    print_facts("uploaded", facts, json=parsed.json)
    if parsed.json:
        print_json(facts)
    return 0
