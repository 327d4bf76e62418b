"""Files of an adapter folder: read once and whole, written atomically."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_READ = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_BINARY", "O_NOFOLLOW"))
_VALUES = 5_000_000  # of one JSON file
_DEPTH = 64


class Unreadable(Exception):
    """Why one file cannot be used; becomes a line of the caller's message."""


@contextmanager
def opened(path: Path, limit: int) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file of at most `limit` bytes, and its size. Raises Unreadable.

    Opened once, so that what was checked is what is used, even if another file takes its name; without blocking, so
    that a pipe in its place cannot hang; and where a link leads out of the folder, not at all.
    """
    try:
        handle = os.open(_followed(path), _READ)
    except FileNotFoundError:
        raise Unreadable(f"{path.name}: missing") from None
    except OSError as error:
        raise Unreadable(f"{path.name}: cannot be opened ({error.strerror})") from error
    try:
        size = _regular(os.fstat(handle), path.name, limit)
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file, size
    except OSError as error:
        raise Unreadable(f"{path.name}: cannot be read ({error.strerror})") from error
    finally:
        os.close(handle)


def _regular(status: os.stat_result, name: str, limit: int) -> int:
    """The size of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(f"{name}: not a regular file")
    if status.st_size > limit:
        raise Unreadable(f"{name}: {status.st_size} bytes, at most {limit} are read")
    return status.st_size


def read_whole(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises Unreadable."""
    with opened(path, limit) as (file, size):
        return file.read(size)  # and no more, should it grow meanwhile


def _followed(path: Path) -> str:
    """Where a link inside the folder leads: another file there, or a blob of the hub's cache of links."""
    if not path.is_symlink():
        return str(path)
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    homes = [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]
    if not any(home in target.parents for home in homes):
        raise Unreadable(f"{path.name}: a link out of the folder, to {str(target)!r:.200}; copy the file itself here")
    return str(target)


def parse_object(raw: bytes, name: str) -> dict[str, Any]:
    """A JSON object without NaN, infinity or repeated keys, of a size that fits into memory. Raises Unreadable.

    A byte of JSON can become 30 of memory (an empty list in a list), so values are counted before they are made.
    """
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > _VALUES:
        raise Unreadable(f"{name}: more than {_VALUES} values")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{name}: not JSON ({escaped(str(error))})") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{name}: got a JSON {type(value).__name__}, wanted an object")
    if not _is_shallow(value):
        raise Unreadable(f"{name}: lists or objects nested more than {_DEPTH} deep")
    return value


def escaped(text: str, shown: int = 200) -> str:
    """Text of somebody else's on one line of a message, short: line ends and terminal codes become visible."""
    cut = text if len(text) <= shown else f"{text[:shown]}..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def _is_shallow(value: Any) -> bool:
    """Whether nothing is nested deeper than functions that call themselves can follow."""
    level = [value]
    for _ in range(_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [item for items in inner for item in items]
        if not level:
            return True
    return False


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
        counts = Counter(key for key, _ in pairs)
        repeated = sorted(f"{key!r:.80}" for key, count in counts.items() if count > 1)
        raise ValueError(f"repeated keys: {', '.join(repeated[:8])}")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")
