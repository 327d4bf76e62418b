"""`veneer merge`: adapters become one adapter, or one becomes part of its base; always with an error report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.cli.layers import print_layers
from veneer.cli.load import base_of
from veneer.cli.output import print_facts, print_json, print_table, say, short, shown
from veneer.cli.parse import Command, parse
from veneer.config import MergeSettings, read_recipe

COMMAND = Command(
    name="merge",
    summary="adapters -> one adapter, or one into its base -> a model for transformers, llama.cpp or Ollama",
    settings=MergeSettings,
    positional="adapters",
    example="veneer merge out/a out/b --method linear --weights 0.7,0.3 --rank 16 -o out/ab",
    read_file=read_recipe,
)
_PARENTS = 12  # told one by one
_MEASURE = (
    "next: --dataset, a data file for each adapter, compares the result with them; unlike skills seldom survive being "
    "added blindly (docs/merging.md)"
)
_ROUNDED = (
    "rounding error: what storing the sum moved, over the norm of the update; kept: the update's own share in what was "
    "stored; logits difference: the largest, beside logits as large as logits scale; kl in nats, same choice: merged "
    "model beside base and adapter, at so many positions of sample prompts"
)
_LEARN = (
    "next: --method lora_soups learns a weight for each adapter and layer from every other row, and kept more where "
    "it was measured (docs/merging.md); or serve each for its own requests"
)


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
    way: dict[str, Any] = {"form": settings.format, "storage": settings.storage, "force": settings.force}
    report = merge_into_base(folder, base, settings.output, settings.dtype, **way).to_json()
    print_facts(f"{folder} in {base} -> {settings.output}", report, json=json)
    say(_ROUNDED)
    if settings.format == "gguf":
        say(f"next: llama-cli -m {settings.output}/model.gguf, or ollama create NAME -f {settings.output}/Modelfile")
    else:
        say(f"next: veneer generate --base-model {settings.output} --prompt TEXT")
    return report


def _merge(settings: MergeSettings) -> dict[str, Any]:
    from veneer.merge.from_folders import merge_folders
    from veneer.merge.pinned import named

    folders = [named(text).path for text in settings.adapters]
    if settings.weights is None:
        say(f"weights: none given, so {1 / len(folders):.4g} for each of {len(folders)} adapters")
    if not settings.dataset:
        return {"output": settings.output, "adapters": folders, **merge_folders(settings).to_json()}
    from veneer.evaluate.merged import Compared, compare_merged
    from veneer.evaluate.metrics import check_names

    check_names(settings.metrics)
    found: list[Compared] = []

    def compare(on_base: Any, adapters: Any, rows: Any) -> Mapping[str, str]:
        found.append(compare_merged(on_base, adapters, folders, rows, settings.metrics, say))
        return found[0].written(short)

    report = merge_folders(settings, base=base_of(settings.base_model, folders), compare=compare).to_json()
    return {"output": settings.output, "adapters": folders, **report, "comparison": found[0].to_json()}


def _print(report: Mapping[str, Any], json: bool) -> None:
    recipe = report["recipe"]
    rows = list(
        zip(report["adapters"], map(shown, recipe["weights"]), (i[:12] for i in report["parents"]), strict=True)
    )
    more = [(f"and {len(rows) - _PARENTS} more", "", "")] if len(rows) > _PARENTS else []
    print_table(f"{recipe['method']} of", ("adapter", "weight", "identity"), rows[:_PARENTS] + more, json=json)
    print_layers(f"-> {report['output']}", report, json=json)
    if learned := {name: value for name, value in report["learned"].items() if not isinstance(value, Mapping)}:
        print_facts("from the rows that were read", learned, json=json)
    if "comparison" in report:
        _print_comparison(report["comparison"], json)
        added = recipe["method"] != "lora_soups" and min(recipe["weights"]) >= 0 and len(recipe["weights"]) > 1
        if added and report["comparison"]["worse_than_own"]:  # what is taken away is meant to be worse
            say(_LEARN)
    elif len(report["adapters"]) > 1:
        say(_MEASURE)
    say(f"again: veneer merge {report['output']}/recipe.yaml --output FOLDER")


def _print_comparison(comparison: Mapping[str, Any], json: bool) -> None:
    """A table as `veneer eval` has it for every parent's file; then what it comes to."""
    from veneer.evaluate.table import grouped

    for one in comparison["files"]:
        heads, rows = grouped(one["metrics"], short)
        print_table(f"{one['file']}, the file of {one['adapter']}: score and 95 % interval", heads, rows, json=json)
    for note in dict.fromkeys(f"{one['file']}: {note}" for one in comparison["files"] for note in one["notes"]):
        say(f"note: {note}")
    for line in comparison["verdicts"]:
        say(line)
