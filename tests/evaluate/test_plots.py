"""Figures as SVG: well-formed, the same bytes each time, in the page's own colours, and true to their data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import pytest

from veneer.evaluate import plots
from veneer.evaluate.plots import NARROW, WIDE

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(params=["loss", "norms"])
def drawing(request, history, norms):
    if request.param == "loss":
        return lambda width=WIDE: plots.loss_curve(history, width)
    return lambda width=WIDE: plots.heat_map(plots.grid(norms), width)


def test_well_formed_and_free_of_the_outside(drawing):
    root = ElementTree.fromstring(drawing())
    assert root.tag == f"{SVG}svg" and root.get("aria-label")
    assert "width" not in root.attrib and root.get("viewBox").startswith(f"0 0 {WIDE} ")
    assert set(re.findall(r"https?://[^\"]*", drawing())) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_same_bytes_under_another_style(drawing):
    first = drawing()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert drawing() == first


def test_same_bytes_in_another_process(history):
    code = f"from veneer.evaluate import plots; print(plots.loss_curve({history!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=True,
    )
    assert run.stdout.decode() == plots.loss_curve(history) + "\n"


def test_colours_are_the_pages_own(drawing):
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing()))
    assert colours <= {"none", "currentColor", "var(--accent)", "var(--second)"}


def test_two_widths_share_no_id(drawing):
    wide, narrow = (set(re.findall(r' id="([^"]+)"', drawing(width))) for width in (WIDE, NARROW))
    assert wide and not wide & narrow


def test_text_stays_text_and_names_no_font(drawing):
    assert "<text" in drawing()
    assert "font-family" not in drawing()


def test_no_history_no_curve():
    assert plots.loss_curve([]) == ""
    assert plots.loss_curve([{"step": 1, "split": "train", "loss": float("nan")}]) == ""
    assert plots.loss_curve([{"step": 1, "split": "train"}]) == ""


def test_curve_of_one_step_and_of_evaluation_alone():
    assert "<svg" in plots.loss_curve([{"step": 1, "split": "train", "loss": 2.0}])
    drawing = plots.loss_curve([{"step": 1, "split": "eval", "loss": 2.0}])
    assert ">validation<" in drawing and ">training<" not in drawing


def test_wide_range_gets_a_logarithmic_axis(history):
    assert "(log)" in plots.loss_curve([*history[:60], {"step": 61, "split": "train", "loss": 0.01}])
    assert "(log)" not in plots.loss_curve([{"step": k, "split": "train", "loss": 2 - k / 50} for k in range(50)])


def test_smoothing_neither_lags_nor_shrinks_to_the_last_point():
    falling = [float(100 - k) for k in range(100)]
    assert plots._smoothed(falling)[:90] == falling[:90]
    assert plots._smoothed([1.0] * 99 + [50.0])[-1] < 25
    assert plots._smoothed([3.0] * 40) == [3.0] * 40


def test_grid_of_a_decoder(norms):
    grid = plots.grid({**norms, "lm_head": 0.5})
    assert grid.modules == ("q_proj", "v_proj", "up_proj")
    assert grid.layers == tuple(range(12))
    assert grid.values["v_proj", 3] == norms["model.layers.3.self_attn.v_proj"]
    assert grid.loose == {"lm_head": 0.5}


@pytest.mark.parametrize(
    "paths, modules",
    [
        (["h.0.attn.proj", "h.0.mlp.proj"], ("attn.proj", "mlp.proj")),
        (["enc.layers.0.proj", "dec.layers.0.proj"], ("enc.layers.proj", "dec.layers.proj")),
        (["h.0.mlp.experts.0.up", "h.0.mlp.experts.1.up"], ("mlp.experts.0.up", "mlp.experts.1.up")),
        (["0.up"], ("up",)),
    ],
)
def test_rows_are_named_as_shortly_as_they_can_be(paths, modules):
    grid = plots.grid(dict.fromkeys(paths, 0.1))
    assert grid.modules == modules
    assert len(grid.values) == len(paths)


def test_cells_tell_their_value_and_fill_by_it(norms):
    drawing = plots.heat_map(plots.grid(norms))
    assert drawing.count("<title>") == len(norms)
    assert "<title>layer 11, up_proj: 3.6 %</title>" in drawing
    cells = dict(re.findall(r"<title>(layer [^:]*)[^<]*</title>(<path.*?/>)", drawing, re.DOTALL))
    found = {title: re.search(r"opacity: ([\d.]+)", cell) for title, cell in cells.items()}
    opacity = {title: float(match[1]) if match else 1.0 for title, match in found.items()}
    assert opacity["layer 0, q_proj"] < opacity["layer 5, v_proj"] < opacity["layer 11, up_proj"]


@pytest.mark.parametrize("norms", [{}, {"lm_head": 0.1}])
def test_no_layers_no_map(norms):
    assert plots.heat_map(plots.grid(norms)) == ""


@pytest.mark.parametrize("norms", [{"h.0.up": 0.0}, {'h.0.a"><b>$x$&': 0.2}, {f"h.{n}.up": 0.1 for n in range(400)}])
def test_zero_updates_hostile_names_and_many_layers(norms):
    ElementTree.fromstring(plots.heat_map(plots.grid(norms), NARROW))


def test_labels_keep_all_their_digits():
    history = [{"split": "train", "step": step, "loss": 10.0 / 10**step} for step in range(5)]
    assert ">0.001<" in plots.loss_curve(history)
