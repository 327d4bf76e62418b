"""Folders that are made whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.errors import ConfigError
from veneer.places import check_folder

_WITHIN = ".veneer.partial"  # in a folder that is somebody else's, so no name that others use
_LONGEST = 240  # bytes of a name that stays below the 255 that file systems take with what is put around it


def free(output: str) -> Path:
    """The folder of that name, which is new or empty and can be written. Raises ConfigError, before any work."""
    folder = Path(os.path.abspath(output))
    folder = folder.resolve() if folder.is_dir() else folder  # a link to an empty folder stays, and is written through
    if folder.exists() and (not folder.is_dir() or any(held.name != _WITHIN for held in folder.iterdir())):
        raise ConfigError(f"--output {output} exists and is not an empty folder; name another, or delete it first")
    check_folder("--output", output)
    return folder


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A name to write to, beside the folder; after the block the folder has it. After an error, nothing is left.

    Where something is mounted at the folder nothing can be put in its place: what was written moves into it. The name
    is inside where another file system is mounted, which may be the larger one.
    """
    mounted = os.path.ismount(folder)
    name = folder.name if len(os.fsencode(folder.name)) < _LONGEST else hashlib.sha256(os.fsencode(folder)).hexdigest()
    partial = folder / _WITHIN if mounted else folder.with_name(f".{name}.partial")
    for left in (partial, folder / _WITHIN):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield partial
        if mounted or not _removed(folder):
            for made in sorted(partial.iterdir()):
                shutil.move(made, folder / made.name)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _removed(folder: Path) -> bool:
    """Whether an empty folder of that name is out of the way; False where something is mounted there."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True
