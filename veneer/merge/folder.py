"""Folders that are made whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.errors import ConfigError
from veneer.places import check_folder


def free(output: str) -> Path:
    """The folder of that name, which is new or empty and can be written. Raises ConfigError, before any work."""
    folder = Path(os.path.abspath(output))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {output} exists and is not an empty folder; name another, or delete it first")
    check_folder("--output", output)
    return folder


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A name beside the folder to write to; after the block the folder has it. After an error, nothing is left."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
