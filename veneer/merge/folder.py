"""Folders that are made whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.errors import ConfigError
from veneer.places import check_folder

_LONGEST = 240  # bytes of a name that stays below the 255 that file systems take with what is put around it


def free(output: str) -> Path:
    """The folder of that name, which is new or empty and can be written. Raises ConfigError, before any work."""
    folder = Path(os.path.abspath(output))
    folder = folder.resolve() if folder.is_dir() else folder  # a link to an empty folder stays, and is written through
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {output} exists and is not an empty folder; name another, or delete it first")
    check_folder("--output", output)
    return folder


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A name to write to, beside the folder; after the block the folder has it. After an error, nothing is left.

    Where another file system is mounted at the folder it cannot be put in its place: the name is inside, and what was
    written moves up.
    """
    mounted = os.path.ismount(folder)
    name = folder.name if len(os.fsencode(folder.name)) < _LONGEST else hashlib.sha256(os.fsencode(folder)).hexdigest()
    partial = folder / ".partial" if mounted else folder.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if mounted:
            for made in sorted(partial.iterdir()):
                made.rename(folder / made.name)
        else:
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
