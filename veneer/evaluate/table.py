"""A result as one table: under each metric the base and every adapter, beside what each is to the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Metrics = Mapping[str, Mapping[str, Any]]
Shown = Callable[[Any], str]


class Line(NamedTuple):
    """One model on one metric; `change` and its interval are empty for the one that others are compared with."""

    metric: str
    model: str
    score: str
    interval: str
    change: str
    change_interval: str
    rows: str


def lines(metrics: Metrics, shown: Shown) -> Iterator[Line]:
    """From `metrics` of a result's JSON; `shown` writes a number."""
    for name, scores in metrics.items():
        slots = {label: score for label, score in scores.items() if label not in ("difference", "differences")}
        changes = scores.get("differences", {})
        if "difference" in scores:
            changes = {list(slots)[-1]: scores["difference"]}
        for label, score in slots.items():
            change = _cells(changes[label], shown, "+") if label in changes else ("", "")
            yield Line(name, label, *_cells(score, shown), *change, shown(score["n"]))


def heads(metrics: Metrics) -> Line:
    """What stands above the columns."""
    first = next(iter(next(iter(metrics.values()))))
    return Line("metric", "model", "score", "95 % interval", f"less {first}", "95 % interval", "rows")


def grouped(metrics: Metrics, shown: Shown) -> tuple[list[str], list[list[str]]]:
    """Heads and rows for a narrow place: the metric on a line of its own, its models below; of one model, beside it."""
    found, above = list(lines(metrics, shown)), heads(metrics)
    if len(found) == len(metrics):
        return [above.metric, above.score, above.interval, above.rows], [
            [line.metric, line.score, line.interval, line.rows] for line in found
        ]
    rows: list[list[str]] = []
    for name in metrics:
        rows += [[name, "", "", "", "", ""], *([f"  {line.model}", *line[2:]] for line in found if line.metric == name)]
    return ["", *above[2:]], rows


def markdown(result: Mapping[str, Any], shown: Shown) -> str:
    """The table as Markdown, with what it was measured on and the notes."""
    settings, metrics = result.get("settings", {}), result["metrics"]
    rows = [heads(metrics), ["---", "---", *["---:"] * 5], *lines(metrics, shown)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    title = f"{settings.get('dataset')}, {result['rows']:,} rows, base model {settings.get('base_model')}"
    return (
        "\n\n".join([title, table, *(["\n".join(f"- {note}" for note in result["notes"])] * bool(result["notes"]))])
        + "\n"
    )


def _cells(score: Mapping[str, Any], shown: Shown, sign: str = "") -> tuple[str, str]:
    """The score and its interval as text; with `sign`, that before what is above 0."""
    low, value, high = (
        "" if x is None else sign * (x > 0) + shown(x) for x in map(score.get, ("low", "score", "high"))
    )
    return value, f"[{low}, {high}]" if low else ""
