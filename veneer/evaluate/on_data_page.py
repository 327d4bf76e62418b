"""The sections of the page of `veneer inspect` that data files add: heat maps of files by adapters, and by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from veneer.evaluate import plots
from veneer.evaluate.foretold import HEADS, LEGEND, TITLE, foretold
from veneer.evaluate.intervals import Score
from veneer.evaluate.matrix import matrix
from veneer.evaluate.on_data import Beside, OnFile
from veneer.evaluate.page import number, table, text
from veneer.evaluate.report import both

Cells = Mapping[tuple[int, int], float | None]


def on_data_sections(found: Sequence[OnFile], names: Sequence[str]) -> list[str]:
    """Nothing without data."""
    if not found:
        return []
    changes: dict[tuple[int, int], float | None] = _cells(found, lambda one: one.change.score)
    changes |= {(one.adapter, one.adapter): one.change.score for one in found}
    # One scale for all changes of loss, so that a colour means the same in each.
    top = max((abs(value) for value in changes.values() if value is not None), default=1.0) or 1.0
    sums = _cells(found, lambda one: one.summed_change.score)
    halves = _cells(found, lambda one: one.halved_change.score)
    written = _cells(found, lambda one: one.functional.ratio)
    return [
        _drawn(
            names,
            changes,
            "Loss of each file, changed by each adapter",
            top,
            "Nats per token, less the base's: below zero the adapter helps. Row: the file of that adapter; column: who "
            "speaks.",
        ),
        _drawn(
            names, sums, "Loss of each file, A + B less A", top, "What it costs the data of the row to add the column."
        ),
        _drawn(names, halves, "Loss of each file, A/2 + B/2 less A", top, "The same of the mean of both."),
        _drawn(
            names,
            written,
            "Written on each file's inputs",
            1.0,
            "‖ΔW_B x‖² / ‖ΔW_A x‖² on the inputs x of A's data, mean over layers: 0 does not answer them, 1 as A does.",
        ),
        _losses(found, names),
        *_foretold(found, names),
        *(_by_layer(one, names) for one in found),
    ]


def _cells(found: Sequence[OnFile], value: Callable[[Beside], float | None]) -> dict[tuple[int, int], float | None]:
    return {(one.adapter, each.other): value(each) for one in found for each in one.beside}


def _drawn(names: Sequence[str], cells: Cells, title: str, top: float, says: str) -> str:
    drawing = matrix(names, cells, title, top)
    return f'<section><h2>{title}</h2><figure>{drawing}</figure><p class="small">{text(says)}</p></section>'


def _losses(found: Sequence[OnFile], names: Sequence[str]) -> str:
    heads = [
        "data of A : B",
        "base",
        "A",
        "B",
        "A + B",
        "A/2 + B/2",
        "A + B less A",
        "A/2 + B/2 less A",
        "kept",
        "cosine",
    ]
    rows = [
        [
            f"{names[one.adapter]} : {names[each.other]}",
            *(number(score.score) for score in (one.base, one.loss, each.loss, each.summed, each.halved)),
            *map(_change, (each.summed_change, each.halved_change)),
            "-" if each.kept is None else f"{each.kept:.0%}",
            number(each.functional.cosine),
        ]
        for one in found
        for each in one.beside
    ]
    says = (
        "Nats per token, with 95 % intervals of changes over rows; kept: of what A surely gained on the base, the "
        "share that A/2 + B/2 keeps; cosine: of what A and B write on A's data."
    )
    return f'<section><h2>Losses</h2>{table(heads, rows)}<p class="small">{says}</p></section>'


def _foretold(found: Sequence[OnFile], names: Sequence[str]) -> list[str]:
    told, _ = foretold(found, names)
    if not told:
        return []
    drawn = table(list(HEADS), [one.cells(names) for one in told])
    return [f'<section><h2>{text(TITLE.capitalize())}</h2>{drawn}<p class="small">{text(LEGEND)}</p></section>']


def _change(score: Score) -> str:
    sure = "" if score.low is None or score.high is None else f" [{number(score.low)}, {number(score.high)}]"
    return number(score.score) + sure


def _by_layer(one: OnFile, names: Sequence[str]) -> str:
    """By module and layer, the most that any other adapter writes."""
    most: dict[str, float] = {}
    for each in one.beside:
        for path, ratio in each.functional.ratios.items():
            most[path] = max(ratio, most.get(path, 0.0))
    grid = plots.grid(most)
    if not grid.values:
        return ""
    top = max(grid.values.values())
    label = "Relative output by module and layer"
    drawing = both(plots.heat_map(grid, plots.WIDE, label), plots.heat_map(grid, plots.NARROW, label))
    scale = f'<p class="scale"><span>0</span><i></i><span>{top:.2g}</span></p>'
    told = "any other" if len(one.beside) > 1 else names[one.beside[0].other]
    says = f"By layer, the most that {told} writes there: ‖ΔW_B x‖² / ‖ΔW_A x‖²."
    title = text(f"Written on the inputs of {names[one.adapter]}'s data")
    return f'<section><h2>{title}</h2>{drawing}{scale}<p class="small">{text(says)}</p></section>'
