"""The tables of `veneer inspect --dataset`: adapters on each other's data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.output import print_table, say

if TYPE_CHECKING:
    from veneer.evaluate.intervals import Score
    from veneer.evaluate.on_data import OnFile

_LEGEND = (
    "loss in nats per token, changes with 95 % intervals over rows; change, B alone: less the base; A + B, A/2 + B/2: "
    "less A alone; kept: of what A surely gained in loss, the share that A/2 + B/2 keeps; writes: "
    "Σ‖ΔW_B x‖² / Σ‖ΔW_A x‖² on A's data, mean over the layers of both; cosine: of the two outputs"
)


def print_on_data(found: Sequence[OnFile], names: Sequence[str], json: bool) -> None:
    """A line for each adapter on each file, and the notes."""
    own = [
        [names[one.adapter], Path(one.file).name, one.rows, one.base.score, one.loss.score, _change(one.change)]
        for one in found
    ]
    print_table(
        "each adapter on its own data", ["adapter", "data", "rows", "base", "with it", "change"], own, json=json
    )
    rows = [
        [
            f"{names[one.adapter]} : {names[each.other]}",
            *(each.functional.layers, each.functional.ratio, each.functional.cosine),
            *map(_change, (each.change, each.summed_change, each.halved_change)),
            "-" if each.kept is None else f"{each.kept:.0%}",
        ]
        for one in found
        for each in one.beside
    ]
    heads = ["data of A : B", "layers", "B writes", "cosine", "B alone", "A + B", "A/2 + B/2", "kept"]
    print_table("the others on its data", heads, rows, json=json)
    say(_LEGEND)
    _print_foretold(found, names, json)
    for note in dict.fromkeys(f"{one.file}: {note}" for one in found for note in one.notes):
        say(f"note: {note}")


def _print_foretold(found: Sequence[OnFile], names: Sequence[str], json: bool) -> None:
    from veneer.evaluate.foretold import HEADS, LEGEND, TITLE, foretold

    told, silent = foretold(found, names)
    if told:
        print_table(TITLE, list(HEADS), [one.cells(names) for one in told], json=json)
        say(LEGEND)
    for note in silent:
        say(f"note: {note}")


def _change(score: Score) -> str:
    sure = "" if score.low is None or score.high is None else f" [{score.low:+.2f}, {score.high:+.2f}]"
    return f"{score.score:+.3f}{sure}"
