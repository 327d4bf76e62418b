"""Files of an adapter folder: read once and whole, written atomically."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Unreadable(Exception):
    """Why one file cannot be used; becomes a line of the caller's message."""


def read_whole(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises Unreadable.

    Opened once, so that what was checked is what is used; without blocking, so that a pipe in its place cannot hang.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise Unreadable(f"{path.name}: missing") from None
    except OSError as error:
        raise Unreadable(f"{path.name}: cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable(f"{path.name}: not a regular file")
        if status.st_size > limit:
            raise Unreadable(f"{path.name}: {status.st_size} bytes, at most {limit} are read")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def parse_object(raw: bytes, name: str) -> dict[str, Any]:
    """A JSON object without NaN, infinity or repeated keys. Raises Unreadable."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{name}: got a JSON {type(value).__name__}, wanted an object")
    return value


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (name -> bytes) into `folder`; all of them or, in a new folder, none.

    A new folder appears at once under its name. In a folder that exists each file is replaced at once, in the order
    given, and other files stay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        fresh.mkdir()
        try:
            for name, raw in files.items():
                _write(fresh / name, raw)
            sync(fresh)
            os.rename(fresh, folder)
            sync(folder.parent)
            return
        except OSError:
            if not folder.exists():  # else: made by someone else in the meantime
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    for name, raw in files.items():
        _replace(folder / name, raw)
    sync(folder)


def _replace(path: Path, raw: bytes) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write(fresh, raw)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _write(path: Path, raw: bytes) -> None:
    with open(path, "xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """The bytes of a file, or the names in a folder, are on the disk when this returns (folders: not on Windows)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"repeated keys: {', '.join(sorted({repr(key) for key in keys if keys.count(key) > 1}))}")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")
