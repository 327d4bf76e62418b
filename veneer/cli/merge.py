"""`veneer merge`: adapters become one adapter, or one becomes part of its base; always with an error report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.cli.layers import print_layers
from veneer.cli.load import base_of
from veneer.cli.output import print_facts, print_json, print_table, say, shown
from veneer.cli.parse import Command, parse
from veneer.config import MergeSettings, read_recipe

COMMAND = Command(
    name="merge",
    summary="adapters -> one adapter, or one into its base -> a model folder that transformers loads",
    settings=MergeSettings,
    positional="adapters",
    example="veneer merge out/a out/b --method linear --weights 0.7,0.3 --rank 16 -o out/ab",
    read_file=read_recipe,
)
_PARENTS = 12  # told one by one


def run(argv: Sequence[str]) -> int:
    """Merge and print the error report."""
    parsed = parse(argv, COMMAND)
    report = _into_base(parsed.settings, parsed.json) if parsed.settings.into_base else _merge(parsed.settings)
    if not parsed.settings.into_base:
        _print(report, parsed.json)
    if parsed.json:
        print_json(report)
    return 0


def _into_base(settings: MergeSettings, json: bool) -> dict[str, Any]:
    from veneer.merge.into_base import merge_into_base

    [folder] = settings.adapters
    base = base_of(settings.base_model, settings.adapters)
    report = merge_into_base(folder, base, settings.output, settings.dtype).to_json()
    print_facts(f"{folder} in {base} -> {settings.output}", report, json=json)
    say(f"next: veneer generate --base-model {settings.output} --prompt TEXT")
    return report


def _merge(settings: MergeSettings) -> dict[str, Any]:
    from veneer.merge.from_folders import merge_folders, named

    if settings.weights is None:
        say(f"weights: none given, so {1 / len(settings.adapters):.4g} for each of {len(settings.adapters)} adapters")
    report = merge_folders(settings).to_json()
    return {"output": settings.output, "adapters": [named(text).path for text in settings.adapters], **report}


def _print(report: Mapping[str, Any], json: bool) -> None:
    recipe = report["recipe"]
    rows = list(
        zip(report["adapters"], map(shown, recipe["weights"]), (i[:12] for i in report["parents"]), strict=True)
    )
    more = [(f"and {len(rows) - _PARENTS} more", "", "")] if len(rows) > _PARENTS else []
    print_table(f"{recipe['method']} of", ("adapter", "weight", "identity"), rows[:_PARENTS] + more, json=json)
    print_layers(f"-> {report['output']}", report, json=json)
    say(f"again: veneer merge {report['output']}/recipe.yaml --output FOLDER")
