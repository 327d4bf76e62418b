"""Where results are to go, asked before the work that makes them: a place that cannot be written costs no run."""

from __future__ import annotations

import os
from pathlib import Path

from veneer.errors import ConfigError


def check_folder(option: str, path: str | Path) -> None:
    """Raises ConfigError unless `path` is a folder that can be written, or can be made one."""
    if Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"{option} {path} is a file; name a folder")
    _check_above(option, Path(path), Path(path))


def check_file(option: str, path: str | Path) -> None:
    """Raises ConfigError unless `path` is a file that can be written, or can be made one."""
    if Path(path).is_dir():
        raise ConfigError(f"{option} {path} is a folder; name a file")
    _check_above(option, Path(path), Path(path))


def _check_above(option: str, path: Path, part: Path) -> None:
    """What is there of the path, from its end: a file in the way, or what may not be written to."""
    while not os.path.lexists(part) and part != part.parent:
        part = part.parent
    if part != path and not part.is_dir():
        raise ConfigError(f"{option} {path}: {part} on the way there is not a folder; name another place")
    if not os.access(part, os.W_OK | os.X_OK if part.is_dir() else os.W_OK):
        raise ConfigError(f"{option} {path}: {part.absolute()} cannot be written to; name another place")
