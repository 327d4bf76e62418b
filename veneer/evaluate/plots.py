"""Figures of the report as inline SVG, readable on light and on dark ground.

Nothing is painted behind a figure, and its colours are the page's own: matplotlib draws in stand-in colours, which
become CSS variables afterwards. Text stays text. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

# Stand-ins that no colour map produces -> what the page calls them.
INK, ACCENT, SECOND = "#010203", "#020304", "#030405"
PAGE_COLOURS = {INK: "currentColor", ACCENT: "var(--accent)", SECOND: "var(--second)"}

WIDE, NARROW = 720, 336  # widths in CSS pixels at which text has its true size: a desk, a phone

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a module's name may hold a dollar sign
    "font.size": 12.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Grid:
    """Relative update norms as modules by layers; `loose` are the modules outside numbered layers."""

    modules: tuple[str, ...]
    layers: tuple[int, ...]
    values: dict[tuple[str, int], float]
    loose: dict[str, float]


def loss_curve(history: Sequence[Mapping[str, Any]], width: int = WIDE) -> str:
    """Loss against step, from metrics.jsonl objects: training (raw and smoothed) and evaluation; "" without any.

    A loss that is not finite is left out; a range of more than a factor of 20 gets a logarithmic axis.
    """
    train, held_out = (_points(history, split) for split in ("train", "eval"))
    if not train and not held_out:
        return ""
    with _theme(f"loss-{width}"):
        figure, axes = _figure(width, height=260 if width == WIDE else 210, left=68, bottom=42, top=24)
        _draw_train(axes, train)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "-o", color=SECOND, linewidth=1.6, markersize=4, label="validation")
        _loss_axis(axes, [loss for _, loss in train + held_out])
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6 if width == WIDE else 4, integer=True))
        axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.8)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, borderaxespad=0, fontsize=12)
        return _svg(figure, "Loss by training step")


def heat_map(grid: Grid, width: int = WIDE, label: str = "Relative update norm by module and layer") -> str:
    """A cell for each module (row) and layer (column), the fuller the larger its update; "" for an empty grid."""
    if not grid.values:
        return ""
    top, row = max(grid.values.values()), 22
    labels = 8 + 6.6 * max(len(module) for module in grid.modules)
    with _theme(f"norms-{width}"):
        figure, axes = _figure(width, height=row * len(grid.modules) + 44, left=labels, bottom=40, top=4)
        for (module, layer), value in grid.values.items():
            corner = (grid.layers.index(layer) - 0.5, grid.modules.index(module) - 0.5)
            share = value / top if top else 0.0
            cell = Rectangle(corner, 1, 1, facecolor=ACCENT, alpha=0.04 + 0.96 * share, linewidth=0)
            cell.set_gid(f"tip:layer {layer}, {_printable(module)}: {100 * value:.3g} %")
            axes.add_patch(cell)
        axes.set_xlim(-0.5, len(grid.layers) - 0.5)
        axes.set_ylim(len(grid.modules) - 0.5, -0.5)
        _name_cells(axes, grid, width)
        return _svg(figure, label)


def grid(norms: Mapping[str, float]) -> Grid:
    """Module paths as a grid: `model.layers.3.self_attn.q_proj` is layer 3, row `q_proj`.

    A row is named by the last part of the path, or by as much of it as tells it from others.
    """
    found = {path: re.match(r"(?:(.*?)\.)?(\d+)\.(.+)$", path) for path in norms}
    inside = {path: (match[1] or "", match[3], int(match[2])) for path, match in found.items() if match}
    rows = list(dict.fromkeys((prefix, rest) for prefix, rest, _ in inside.values()))
    named = dict(zip(rows, _short_names(rows), strict=True))
    return Grid(
        modules=tuple(named.values()),
        layers=tuple(sorted({layer for _, _, layer in inside.values()})),
        values={(named[prefix, rest], layer): norms[path] for path, (prefix, rest, layer) in inside.items()},
        loose={path: norm for path, norm in norms.items() if path not in inside},
    )


def _short_names(rows: Sequence[tuple[str, str]]) -> list[str]:
    for name in (lambda prefix, rest: rest.rsplit(".", 1)[-1], lambda prefix, rest: rest):
        names = [name(*row) for row in rows]
        if len(set(names)) == len(names):
            return names
    return [f"{prefix}.{rest}" for prefix, rest in rows]


def _points(history: Sequence[Mapping[str, Any]], split: str) -> list[tuple[float, float]]:
    rows = [(row["step"], row.get("loss")) for row in history if row.get("split") == split]
    return [(step, loss) for step, loss in rows if loss is not None and math.isfinite(loss)]


def _draw_train(axes: Axes, points: list[tuple[float, float]]) -> None:
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    if len(points) < 20:
        axes.plot(steps, losses, "-o", color=ACCENT, linewidth=1.8, markersize=3, label="training")
        return
    axes.plot(steps, losses, color=ACCENT, linewidth=1, alpha=0.3)
    axes.plot(steps, _smoothed(losses), color=ACCENT, linewidth=2, label="training (smoothed)")


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over a window of about a twentieth of the run, centred: a trailing mean would show a falling loss late.

    The window shrinks towards the start, where the loss falls fastest, and is cut off at the end.
    """
    reach = max(2, len(losses) // 40)
    found = []
    for place in range(len(losses)):
        before = min(reach, place)
        window = losses[place - before : place + before + 1]
        found.append(math.fsum(window) / len(window))
    return found


def _loss_axis(axes: Axes, losses: list[float]) -> None:
    low, high = min(losses), max(losses)
    if low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("loss, nats a token (log)")
        return
    axes.set_ylim(bottom=min(0.0, low))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel("loss, nats a token")


def _name_cells(axes: Axes, grid: Grid, width: int) -> None:
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if len(grid.layers) * 26 <= step * width)
    shown = [place for place, layer in enumerate(grid.layers) if layer % every == 0]
    axes.set_xticks(shown, [str(grid.layers[place]) for place in shown])
    axes.set_yticks(range(len(grid.modules)), [_printable(module) for module in grid.modules])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _printable(name: str) -> str:
    """In ASCII, the rest as escapes: matplotlib cannot measure text that its own font has no shapes for."""
    return ascii(name)[1:-1]


@contextmanager
def _theme(salt: str) -> Iterator[None]:
    """matplotlib's defaults and STYLE, whatever the user's matplotlibrc says; `salt` keeps two figures' ids apart."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": salt})
        yield


def _figure(width: float, height: float, left: float, bottom: float, top: float) -> tuple[Figure, Axes]:
    """A figure of width x height with margins, all in CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72))
    FigureCanvasSVG(figure)
    box = (left / width, bottom / height, 1 - (left + 8) / width, 1 - (bottom + top) / height)
    return figure, figure.add_axes(box)


def _svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element that takes the page's width, colours and fonts."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    drawing = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", drawing)
    drawing = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", drawing)  # two widths on one page would repeat the names
    drawing = re.sub(r" font-family: [^;\"]*;", "", drawing)
    # A hundredth of a pixel is enough; inside tags only, because a label of 0.001 is not 0.00.
    drawing = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), drawing)
    drawing = re.sub(r' (?:width|height)="[\d.]+pt"', "", drawing, count=2)
    for stand_in, colour in PAGE_COLOURS.items():
        drawing = drawing.replace(stand_in, colour)
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return re.sub(r">\s+<", "><", drawing).strip()
