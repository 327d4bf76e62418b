"""Draw the figures of docs/learn.md from docs/learn/measured.json. `--check` only compares.

python tools/learn_figures.py

The same measurements and the same matplotlib give the same bytes.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "learn"
MEASURED = FOLDER / "measured.json"
INK, MUTED, GROUND = "#1d1c1a", "#6d6861", "#ffffff"
GREEN, ORANGE, BLUE = "#14696b", "#b65a2a", "#3b5ea8"
SERIES = (GREEN, ORANGE, BLUE)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "svg.hashsalt": "learn",
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def factors(axes: Axes, _: dict[str, Any]) -> None:
    """W, B and A at their true proportions: 576 by 576, rank 16."""
    size, rank, gap = 576, 16, 90
    half, right = size / 2, size + 2 * gap + rank
    places = {
        "W  576 × 576": (0, 0, size, size, MUTED),
        "B  576 × 16": (size + gap, 0, rank, size, ORANGE),
        "A  16 × 576": (right, half - rank / 2, size, rank, GREEN),
    }
    for label, (x, y, width, height, colour) in places.items():
        axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, alpha=0.85))
        axes.text(x + width / 2, y - 24, label, ha="center", va="top")
    for place, sign in ((size + gap / 2, "+"), (size + 1.5 * gap + rank, "×")):
        axes.text(place, half, sign, ha="center", va="center", fontsize=18)
    axes.text(half, half, "331,776 numbers\nfrozen", ha="center", va="center", color="#ffffff")
    axes.text(right + half, half + 60, "B and A: 18,432 numbers\ntrained", ha="center", va="center")
    axes.set_xlim(-10, 2 * size + 2 * gap + rank + 10)
    axes.set_ylim(-80, size + 10)
    axes.set_aspect("equal")
    axes.axis("off")


def spectrum(axes: Axes, found: dict[str, Any]) -> None:
    """Singular values, each beside its largest."""
    for values, label, colour in (
        (found["spectrum"]["weight"], "the weight W", MUTED),
        (found["spectrum"]["update"], "the update ΔW, allowed rank 64", GREEN),
    ):
        axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=2, label=label)
    axes.set_xlim(0, 128)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("direction, the strongest first")
    axes.set_ylabel("strength beside the strongest")
    axes.legend(loc="upper right")


def scale(axes: Axes, found: dict[str, Any]) -> None:
    """How large the update is after the same steps at the same rate, by rank."""
    ranks = sorted({run["r"] for run in found["sweep"]})
    rates = sorted({run["learning_rate"] for run in found["sweep"]})[:3]
    for rate, colour in zip(rates, SERIES, strict=True):
        sizes = [100 * _run(found, rank, rate)["update"] for rank in ranks]
        axes.plot(range(len(ranks)), sizes, "-o", color=colour, linewidth=2, label=f"learning rate {rate:g}")
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rank r, at lora_alpha 32 and s = 32 / r")
    axes.set_ylabel("‖ΔW‖ in % of ‖W‖")
    axes.legend(loc="upper right")


def rate(axes: Axes, found: dict[str, Any]) -> None:
    """Held-out loss after the same steps, by rank and learning rate."""
    for rank, colour in zip(sorted({run["r"] for run in found["sweep"]}), SERIES, strict=True):
        runs = [run for run in found["sweep"] if run["r"] == rank and run["after"] is not None]
        points = [(run["learning_rate"], run["after"]) for run in runs]
        axes.plot(*zip(*points, strict=True), "-o", color=colour, linewidth=2, label=f"rank {rank}")
    axes.axhline(found["start"]["base"], color=MUTED, linewidth=1, linestyle="--")
    axes.text(found["sweep"][0]["learning_rate"], found["start"]["base"], "before training", color=MUTED, va="bottom")
    axes.set_xscale("log")
    rates = sorted({run["learning_rate"] for run in found["sweep"]})
    axes.set_xticks(rates, [f"{one:g}" for one in rates])
    axes.minorticks_off()
    axes.set_ylim(0, found["start"]["base"] * 1.12)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss, nats a token")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.88))


def quantised(axes: Axes, found: dict[str, Any]) -> None:
    """One block of 64 weights, and the sixteen values that NF4 has for it."""
    weight, stored = found["quantised"]["weight"], found["quantised"]["nf4"]
    order = sorted(range(len(weight)), key=weight.__getitem__)
    for level in sorted(set(stored)):
        axes.axhline(level, color=MUTED, linewidth=0.6, alpha=0.5)
    axes.plot([weight[k] for k in order], "o", markersize=4, color=GREEN, label="weights of one block, sorted")
    axes.plot([stored[k] for k in order], "_", markersize=8, color=ORANGE, label="what NF4 keeps of them")
    axes.set_xlabel("the 64 weights")
    axes.set_ylabel("value")
    axes.legend(loc="upper left")


def _run(found: dict[str, Any], rank: int, learning_rate: float) -> dict[str, Any]:
    return next(run for run in found["sweep"] if (run["r"], run["learning_rate"]) == (rank, learning_rate))


FIGURES: dict[str, tuple[Callable[[Axes, dict[str, Any]], None], tuple[float, float]]] = {
    "factors": (factors, (7.2, 3.4)),
    "spectrum": (spectrum, (7.2, 3.2)),
    "scale": (scale, (7.2, 3.2)),
    "rate": (rate, (7.2, 3.4)),
    "quantised": (quantised, (7.2, 3.4)),
}
"""File -> (what draws it, inches)."""


def drawn(name: str, found: dict[str, Any]) -> bytes:
    """The SVG of one figure."""
    draw, size = FIGURES[name]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=size, facecolor=GROUND, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot(), found)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": f"matplotlib {matplotlib.__version__}"})
    return buffer.getvalue()


def main(words: list[str]) -> int:
    """Writes the figures; with --check, says which are not what would be drawn."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    figures = {FOLDER / f"{name}.svg": drawn(name, found) for name in FIGURES}
    if "--check" not in words:
        for path, raw in figures.items():
            path.write_bytes(raw)
        return 0
    stale = [path.name for path, raw in figures.items() if not path.is_file() or path.read_bytes() != raw]
    if stale:
        print(f"{', '.join(stale)} differ from what would be drawn; run python tools/learn_figures.py", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
