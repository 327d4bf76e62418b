"""The figures of docs/learn.md are those that their script draws from the numbers beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import pytest

from tools.learn_figures import FIGURES, FOLDER, MEASURED, drawn, main

PAGE = FOLDER.parent / "learn.md"
SWEEP = {(rank, rate) for rank in (1, 8, 64) for rate in (3e-4, 1e-3, 3e-3, 1e-2)}


def found() -> dict:
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def test_every_figure_is_on_the_page_and_the_page_has_no_other() -> None:
    shown = re.findall(r'src="learn/(\w+)\.svg"', PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(FIGURES)
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(FIGURES)


def test_the_same_numbers_draw_the_same_bytes(tmp_path: Path) -> None:
    assert {name: drawn(name, found()) for name in FIGURES} == {name: drawn(name, found()) for name in FIGURES}


def test_they_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    drawer = f"matplotlib {matplotlib.__version__}<"
    if drawer not in (FOLDER / "rate.svg").read_text(encoding="utf-8"):
        pytest.skip(f"drawn by another matplotlib than {matplotlib.__version__}, which may place a line elsewhere")
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_another_number_is_another_figure() -> None:
    other = found()
    for run in other["sweep"]:
        run["after"] *= 0.9
    assert drawn("rate", other) != drawn("rate", found())


def test_the_numbers_are_what_the_page_builds_on() -> None:
    numbers = found()
    assert {(run["r"], run["learning_rate"]) for run in numbers["sweep"]} == SWEEP
    assert numbers["start"]["base"] == numbers["start"]["b_zero"]
    assert len(numbers["spectrum"]["update"]) == 64
    assert len(set(numbers["quantised"]["nf4"])) <= 16
