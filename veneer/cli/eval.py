"""`veneer eval`: base and adapters on a data file, with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.cli.load import base_of
from veneer.cli.output import print_json, print_table, say, short
from veneer.cli.parse import Command, parse
from veneer.config import EvalSettings
from veneer.places import check_file

COMMAND = Command(
    name="eval",
    summary="base and adapters on a data file: loss, perplexity and task metrics, with intervals",
    settings=EvalSettings,
    positional="adapter",
    example="veneer eval --adapter out/skill --dataset test.jsonl --metrics exact_match",
)


def run(argv: Sequence[str]) -> int:
    """Evaluate and print."""
    parsed = parse(argv, COMMAND)
    if parsed.settings.output is not None:
        check_file("--output", parsed.settings.output)
    from veneer.evaluate.table import grouped
    from veneer.evaluate.verb import evaluate_files

    base = base_of(parsed.settings.base_model, parsed.settings.adapter)
    settings = parsed.settings.model_copy(update={"base_model": base})
    result = evaluate_files(settings).to_json()
    _write(settings.output, result)
    title = f"{settings.dataset or ', '.join(settings.harness)}: score and 95 % interval"
    heads, rows = grouped(result["metrics"], short)
    print_table(title, heads, rows, json=parsed.json)
    for note in result.get("notes") or ():
        say(f"note: {note}")
    if parsed.json:
        print_json(result)
    return 0


def _write(output: str | None, result: Mapping[str, Any]) -> None:
    """The table as Markdown where the file is called so, else all of the result as JSON."""
    if output is not None:
        from veneer.evaluate.table import markdown

        whole = json.dumps(result, ensure_ascii=False, indent=1) + "\n"
        text = markdown(result, short) if Path(output).suffix.lower() == ".md" else whole
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8")
