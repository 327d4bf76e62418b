"""What a recipe names outside of itself: by path, relative to its file, and by what has to lie there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from veneer.config.values import PIN


@dataclass(frozen=True)
class Named:
    """An adapter, or a data file, as it is named: where it lies, and which one it has to be."""

    path: str
    identity: str | None = None


def named(text: str) -> Named:
    """`PATH` or `PATH@sha256:IDENTITY`."""
    found = PIN.search(text)
    return Named(text[: found.start()], found[1]) if found and found.start() else Named(text)


def pinned(path: str, identity: str, output: Path) -> str:
    """The inverse of `named`, for a file in the folder `output`; what is no path stays as it is."""
    return f"{relative(path, output) if os.path.exists(path) else path}@sha256:{identity}"


def relative(path: str, output: Path) -> str:
    """The path as it is seen from the folder."""
    try:
        return os.path.relpath(os.path.realpath(path), os.path.realpath(output))
    except ValueError:  # on another drive
        return os.path.realpath(path)
