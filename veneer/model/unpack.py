"""Small GGUF files, unpacked once into a cache folder.

transformers reads a GGUF's metadata anew for config, tokenizer and weights, in Python, 20 seconds for a model of 135M;
from the unpacked folder it takes one. VENEER_CACHE says where (default ~/.cache/veneer); deleting it is harmless.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from veneer.model.source import Source

SMALL = 512 * 2**20  # bytes of a GGUF file; larger ones would fill the disk with their float32 values


def unpacked(source: Source, read: Callable[[Source], tuple[Any, Any]]) -> Source:
    """The source as a plain folder where that is possible, else the source itself.

    read: source -> (model in float32, tokenizer), used the first time.
    """
    file = source.local
    if source.gguf_file is None or file is None or file.stat().st_size > SMALL:
        return source
    folder = cache_folder() / "gguf" / _key(file)
    if not (folder / "config.json").is_file():
        print(f"unpacking {file.name} once, into {folder}", file=sys.__stderr__)
        if not _write(folder, *read(source)):
            return source
    return replace(source, place=str(folder), gguf_file=None)


def cache_folder() -> Path:
    """Where veneer keeps what it can make again."""
    return Path(os.environ.get("VENEER_CACHE") or Path.home() / ".cache" / "veneer")


def _key(file: Path) -> str:
    """Another file, or another transformers, is another folder."""
    with file.open("rb") as data:
        head = data.read(2**20)
        data.seek(max(0, file.stat().st_size - 2**20))
        tail = data.read()
    facts = f"{file.stat().st_size}/{transformers.__version__}".encode()
    return hashlib.sha256(head + tail + facts).hexdigest()[:24]


def _write(folder: Path, model: Any, tokenizer: Any) -> bool:
    """Whole or not at all; False where the disk does not take it (read-only home, full disk)."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not folder.exists():
            partial.rename(folder)
    except OSError:
        return folder.is_dir()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True
