"""Places for results: what can be written passes, what cannot is told before any work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.places import check_file, check_folder

CHECKS = (check_folder, check_file)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["new", "several/that/are/new"])
def test_what_can_be_made_passes_and_is_not_made(check: Callable, name: str, tmp_path: Path) -> None:
    check("--output", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.md").write_text("old")
    check_folder("--output-dir", tmp_path)
    check_file("--output", tmp_path / "table.md")
    monkeypatch.chdir(tmp_path)
    check_file("--output", "table.md")
    check_folder("--output-dir", "out/skill")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("rest", ["x", "x/y"])
def test_a_file_on_the_way_is_named(check: Callable, rest: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"--output .*notes\.txt on the way there is not a folder"):
        check("--output", tmp_path / "notes.txt" / rest)


def test_a_file_is_no_folder_and_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        check_folder("--output-dir", tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        check_file("--output", tmp_path)


@pytest.mark.parametrize("check", CHECKS)
def test_what_may_not_be_written_to(check: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write wherever permissions forbid it
    with pytest.raises(ConfigError, match="cannot be written to; name another place"):
        check("--output", tmp_path / "new")
