"""One page that shows what an adapter learned: report.html, with all it needs inside, from plain values.

The page loads nothing (a content policy forbids it), runs no script, follows the reader's light or dark setting and
the width of a phone. The same values give the same bytes.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.evaluate import plots
from veneer.evaluate.answers import answers
from veneer.evaluate.intervals import Score
from veneer.evaluate.metrics import LOWER_IS_BETTER, is_share
from veneer.evaluate.page import PAGE, STYLE, text
from veneer.evaluate.result import Result

MINUS = "\N{MINUS SIGN}"
TRAINING_FIGURES = {
    "trainable_parameters": "trained parameters",
    "train_seconds": "training time",
    "tokens_per_second": "tokens a second",
    "peak_memory_bytes": "peak memory",
}


def write_report(
    path: str | Path,
    *,
    title: str,
    card: Mapping[str, Any],
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    result: Result | None,
    norms: Mapping[str, float] | None,
    notes: Sequence[str],
) -> None:
    """Write the page at `path`, atomically.

    card      veneer.json; its `training` gives the figures of the run
    settings  flat options of the run
    history   objects of metrics.jsonl
    result    of evaluate(); None leaves out what needs it
    norms     module path -> |ΔW| / |W| (Frobenius), in module order; None leaves out the heat map
    notes     warnings, shown before anything else
    """
    warnings = [*notes, *(note for note in (result.notes if result else ()) if note not in notes)]
    sections = [
        notes_list(warnings),
        _headline(card, result, history),
        _comparison(result),
        _curve(history),
        _norms(norms),
        answers(result),
        details("Settings of the run", settings),
        details("Adapter card", card),
    ]
    page = PAGE.format(title=text(title), style=STYLE, subtitle=_subtitle(card, result), body="\n".join(sections))
    write_page(Path(path), page)


def write_page(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(page.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _subtitle(card: Mapping[str, Any], result: Result | None) -> str:
    method = text(card.get("method", "adapter"))
    base = card.get("base_name") or (result.settings.get("base_model") if result else None)
    on = f" on <b>{text(base)}</b>" if base else ""
    rows = f" · evaluated on {result.rows:,} rows of {text(result.settings.get('dataset', ''))}" if result else ""
    return f"{method}{on}{rows}"


def notes_list(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{text(note)}</li>" for note in notes) + "</ul>"


# --- headline ---------------------------------------------------------------------------------------------------


def _headline(card: Mapping[str, Any], result: Result | None, history: Sequence[Mapping[str, Any]]) -> str:
    figures = [_metric_figure(result, name) for name in result.metrics] if result else []
    if not result:
        figures += _losses(card.get("training") or {}, history)
    training = card.get("training") or {}
    small = [
        f"<div><dt>{label}</dt><dd>{_quantity(key, training[key])}</dd></div>"
        for key, label in TRAINING_FIGURES.items()
        if isinstance(training.get(key), int | float)
    ]
    facts = f'<dl class="facts">{"".join(small)}</dl>' if small else ""
    return f'<section class="figures">{"".join(figures)}</section>{facts}'


def _losses(training: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of rows it never saw first, of the adapter that was kept; then of those it was trained on, its last step's."""
    before, after = training.get("eval_loss_before"), training.get("best_eval_loss")
    held_out = [_figure("validation loss", f"{after:.3g}", f"before {before:.3g}")] if before and after else []
    losses = [row["loss"] for row in history if row.get("split") == "train" and row.get("loss") is not None]
    seen = [_figure("training loss", f"{losses[-1]:.3g}", f"from {losses[0]:.3g}")] if losses else []
    return held_out + seen


def _metric_figure(result: Result, name: str) -> str:
    """The last slot's score, large, and what it was in the first."""
    (first, before), (last, after) = _ends(result, name)
    detail = f"{text(first)} {_value(name, before.score)}" if first != last else _range(name, after)
    return _figure(_metric_name(name), _value(name, after.score), detail)


def _figure(label: str, value: str, detail: str) -> str:
    return f'<div class="figure"><span>{label}</span><strong>{value}</strong><em>{detail}</em></div>'


def _ends(result: Result, name: str) -> tuple[tuple[str, Score], tuple[str, Score]]:
    slots = list(result.metrics[name].items())
    return slots[0], slots[-1]


def _quantity(key: str, value: float) -> str:
    if key == "train_seconds":
        return f"{value:.0f} s" if value < 120 else f"{value // 60:.0f} min {value % 60:.0f} s"
    if key == "peak_memory_bytes":
        return f"{value / 2**30:.2f} GiB"
    return f"{value / 1e6:,.2f} M" if value >= 1e6 else f"{value:,.0f}"


# --- before and after -------------------------------------------------------------------------------------------


def _comparison(result: Result | None) -> str:
    if not result:
        return ""
    first, *others = next(iter(result.metrics.values()))
    changes = [f"{other} {MINUS} {first}" for other in others]
    heads = "".join(f"<th>{text(label)}</th>" for label in [first, *others, *changes])
    rows = "".join(_comparison_row(result, name) for name in result.metrics)
    return (
        f"<section><h2>{'Before and after' if others else 'Scores'}</h2>"
        f'<div class="scroll"><table class="scores"><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody>'
        f'</table></div><p class="small">Mean over {result.rows:,} rows with its 95 % interval (bootstrap over rows; '
        f"Wilson where all rows score alike{'; differences are paired, row by row' if others else ''}). Loss is in "
        "nats a token of the answers. Lower loss and perplexity are better; of all else, higher.</p></section>"
    )


def _comparison_row(result: Result, name: str) -> str:
    scores, changes = result.metrics[name], result.differences[name]
    cells = "".join(f"<td>{_value(name, one.score)}<small>{_range(name, one)}</small></td>" for one in scores.values())
    cells += "".join(
        f'<td class="{_verdict(name, one)}">{_value(name, one.score, change=True)}'
        f"<small>{_range(name, one, change=True)}</small></td>"
        for one in changes.values()
    )
    bars = _bars(scores) if is_share(name) else ""
    columns = 1 + len(scores) + len(changes)
    strip = f'<tr class="strip" aria-hidden="true"><td colspan="{columns}">{bars}</td></tr>' if bars else ""
    return f"<tr><th>{_metric_name(name)}</th>{cells}</tr>{strip}"


def _bars(scores: Mapping[str, Score]) -> str:
    """On a track from 0 to 100 %: a band for each slot's interval and a mark at its score."""
    marks = []
    for place, score in enumerate(scores.values()):
        low, high = score.low or 0.0, score.score if score.high is None else score.high
        kind = "first" if place == 0 else "other"
        marks.append(f'<i class="band {kind}" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>')
        marks.append(f'<i class="mark {kind}" style="left:{100 * score.score:.2f}%"></i>')
    return f'<div class="track">{"".join(marks)}</div>'


def _verdict(name: str, change: Score) -> str:
    """better or worse where the interval leaves zero out, else nothing."""
    if change.low is None or change.high is None or change.low <= 0 <= change.high:
        return ""
    return "better" if (change.score < 0) == (name in LOWER_IS_BETTER) else "worse"


def _metric_name(name: str) -> str:
    return text(name.replace("_", " "))


def _value(name: str, value: float, change: bool = False) -> str:
    if is_share(name):
        return (f"{100 * value:+.1f} pts" if change else f"{100 * value:.1f} %").replace("-", MINUS)
    sign = "+" if change else ""
    digits = f"{value:{sign},.0f}" if 100 <= abs(value) < 1e6 else f"{value:{sign}#.3g}"
    return digits.replace("-", MINUS).removesuffix(".")


def _range(name: str, score: Score, change: bool = False) -> str:
    if score.low is None or score.high is None:
        return "no interval"
    low, high = _value(name, score.low, change), _value(name, score.high, change)
    return f"{low.split()[0]} to {high.split()[0]}"


# --- figures ----------------------------------------------------------------------------------------------------


def _curve(history: Sequence[Mapping[str, Any]]) -> str:
    if not (drawing := plots.loss_curve(history, plots.WIDE)):
        return ""
    return f"<section><h2>Loss</h2>{both(drawing, plots.loss_curve(history, plots.NARROW))}</section>"


def both(wide: str, narrow: str) -> str:
    return f'<figure class="wide">{wide}</figure><figure class="narrow">{narrow}</figure>'


def _norms(norms: Mapping[str, float] | None) -> str:
    if not norms:
        return ""
    grid = plots.grid(norms)
    drawing = both(plots.heat_map(grid, plots.WIDE), plots.heat_map(grid, plots.NARROW)) if grid.values else ""
    most = max(norms, key=lambda path: norms[path])
    loose = "".join(f" Outside the layers: {text(path)} {100 * norm:.2g} %." for path, norm in grid.loose.items())
    top = max(grid.values.values(), default=0.0)
    scale = f'<p class="scale"><span>0</span><i></i><span>{100 * top:.2g} %</span></p>' if drawing else ""
    return (
        f"<section><h2>Where it changed</h2>{drawing}{scale}"
        f'<p class="small">Size of each update beside its weight, ‖ΔW‖ / ‖W‖, over {len(norms):,} weights: median '
        f"{100 * statistics.median(norms.values()):.2g} %, most in {text(most)} ({100 * norms[most]:.2g} %).{loose}"
        "</p></section>"
    )


# --- settings and card ------------------------------------------------------------------------------------------


def details(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{text(key)}</th><td>{_plain(value)}</td></tr>" for key, value in _flat(values))
    table = f'<table class="plain"><tbody>{rows}</tbody></table>'
    return f"<section><details><summary><h2>{title}</h2></summary>{table}</details></section>" if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested objects as dotted names; a table of many modules stays one value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and 0 < len(value) <= 16:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> str:
    if value is None or value == "" or value == {} or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return _table_of_modules(value)
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return text(value)


def _table_of_modules(values: Mapping[str, Any]) -> str:
    distinct = {_plain(value) for value in values.values()}
    if len(distinct) == 1:
        return f"{distinct.pop()} <small>on all {len(values):,} modules</small>"
    lines = "".join(f"<div>{text(key)} <b>{_plain(value)}</b></div>" for key, value in values.items())
    return f"<details><summary>{len(values):,} entries, {len(distinct):,} values</summary>{lines}</details>"
