"""A folder is made whole or not at all, wherever it lies."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.merge.folder import free, whole


def write(folder: Path) -> None:
    with whole(free(str(folder))) as partial:
        (partial / "within").mkdir(parents=True)
        (partial / "within" / "file").write_text("made")
        (partial / "file").write_text("made")


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


MADE = ["file", "within", "within/file"]


def test_new_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "n" * 255):
        write(tmp_path / name)
        assert names(tmp_path / name) == MADE
    with pytest.raises(ConfigError, match="not an empty folder"):
        write(tmp_path / "new")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_to_an_empty_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "there") == MADE


def test_where_another_file_system_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be neither removed nor replaced."""
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda folder: Path(folder) == tmp_path / "mounted")
    monkeypatch.setattr(Path, "rmdir", lambda self: pytest.fail(f"{self} removed"))
    write(tmp_path / "mounted")
    assert names(tmp_path / "mounted") == MADE and names(tmp_path) == ["mounted", *(f"mounted/{n}" for n in MADE)]


def test_where_a_part_of_the_same_file_system_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not show before it is to be removed."""
    (tmp_path / "bound").mkdir()

    def busy(folder: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(folder))

    monkeypatch.setattr(Path, "rmdir", busy)
    write(tmp_path / "bound")
    assert names(tmp_path) == ["bound", *(f"bound/{name}" for name in MADE)]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    for left in (tmp_path / "out" / ".veneer.partial", tmp_path / ".out.partial"):
        left.mkdir(parents=True)
        (left / "half").touch()
    write(tmp_path / "out")
    assert names(tmp_path) == ["out", *(f"out/{name}" for name in MADE)]


@pytest.mark.parametrize("mounted", [False, True])
def test_after_an_error_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda _: mounted)

    def half() -> None:
        with whole(tmp_path / "out") as partial:
            partial.mkdir()
            (partial / "half").touch()
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        half()
    assert names(tmp_path) == ["out"]
