"""`veneer eval`: base and adapters on a data file, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from veneer.cli.load import base_of
from veneer.cli.output import print_json, print_table, say, shown
from veneer.cli.parse import Command, parse
from veneer.config import EvalSettings

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
    from veneer.evaluate.verb import evaluate_files

    base = base_of(parsed.settings.base_model, parsed.settings.adapter)
    settings = parsed.settings.model_copy(update={"base_model": base})
    result = evaluate_files(settings).to_json()
    rows = [[metric, who, *cells] for metric, scores in result["metrics"].items() for who, cells in _scores(scores)]
    title = f"{settings.dataset}: score and 95 % interval"
    print_table(title, ("metric", "model", "score", "low", "high", "rows"), rows, json=parsed.json)
    for note in result.get("notes") or ():
        say(f"note: {note}")
    if parsed.json:
        print_json(result)
    return 0


def _scores(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every score in a metric's object, however deep (the difference of each of several adapters)."""
    for who, value in scores.items():
        if "score" in value:
            yield prefix + who, [shown(value.get(key)) for key in ("score", "low", "high", "n")]
        else:
            yield from _scores(value, f"{prefix}{who} ")
