"""The bar of a long load: after a moment only; lines where there is no terminal; never between caller and items."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from veneer.model import progress
from veneer.model.progress import shown


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=out, force_terminal=True, width=80))
    return out


def test_a_long_load_is_shown(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    assert list(shown([1, 2, 3], "reading m as nf4", True)) == [1, 2, 3]
    assert "reading m as nf4" in terminal.getvalue()


@pytest.mark.parametrize(("wanted", "patience"), [(True, 60.0), (False, -1.0)])
def test_a_short_one_and_one_that_is_not_to_be_are_not(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, wanted: bool, patience: float
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", patience)
    assert list(shown(["a"], "reading", wanted)) == ["a"]
    assert terminal.getvalue() == ""


def test_lines_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", -1.0)
    assert list(shown("abc", "learning", True)) == ["a", "b", "c"]
    assert capfd.readouterr().err == "learning: 0 of 3\n"
    assert list(shown("abc", "learning", False)) == ["a", "b", "c"]
    assert capfd.readouterr().err == ""


def test_nothing_in_the_first_moment_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(shown([1], "reading", True)) == [1]
    assert capfd.readouterr() == ("", "")
