"""A square heat map of how each thing stands to each other, as inline SVG in the page's own colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.evaluate.page import text

CELL, ROW, LETTER = 56, 30, 7.2  # CSS pixels
LONGEST = 28  # letters of a name


def matrix(names: Sequence[str], values: Mapping[tuple[int, int], float | None], label: str, top: float) -> str:
    """A cell for each pair (i, j) and (j, i) with its value, the fuller the larger; of another colour below zero.

    values: (i, j), row and column -> value; one of (i, j) and (j, i) stands for both. top: the size that is full. Rows
    are named, columns numbered like them.
    """
    shown = [
        f"{place + 1}  {name[: LONGEST - 1] + '…' if len(name) > LONGEST else name}" for place, name in enumerate(names)
    ]
    left = 12 + LETTER * max(map(len, shown))
    width, height = left + CELL * len(names), ROW * (len(names) + 1)
    heads = "".join(_text(left + (i + 0.5) * CELL, 0.65 * ROW, str(i + 1), "middle") for i in range(len(names)))
    rows = "".join(_text(0, (i + 1.65) * ROW, name, "start") for i, name in enumerate(shown))
    both_ways = {**{(j, i): value for (i, j), value in values.items()}, **values}
    cells = "".join(_cell(left, i, j, value, names, top) for (i, j), value in sorted(both_ways.items()))
    return (
        f'<svg role="img" aria-label="{text(label)}" viewBox="0 0 {width:.0f} {height}" '
        f'style="max-width:{width:.0f}px" font-size="12" fill="currentColor">{heads}{rows}{cells}</svg>'
    )


def _cell(left: float, i: int, j: int, value: float | None, names: Sequence[str], top: float) -> str:
    x, y = left + j * CELL, (i + 1) * ROW
    told = "–" if value is None else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
    share = min(1.0, abs(value or 0.0) / top) if top else 0.0
    colour = "var(--second)" if (value or 0.0) < 0 else "var(--accent)"
    # At most 0.55: the number is in the page's ink, and stays readable on it.
    return (
        f"<g><title>{text(names[i])}, {text(names[j])}: {told}</title>"
        f'<rect x="{x:.1f}" y="{y}" width="{CELL - 2}" height="{ROW - 2}" fill="{colour}" '
        f'fill-opacity="{0.04 + 0.51 * share:.2f}"/>{_text(x + CELL / 2 - 1, y + 0.62 * ROW, told, "middle")}</g>'
    )


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" xml:space="preserve">{text(words)}</text>'
