"""A safetensors file of an adapter: its header is checked before the rest is read, and no byte is read twice.

The library checks that tensors lie end to end; it accepts repeated keys, numbers of any type, and sides of length 0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from veneer.adapter.faults import add_fault
from veneer.adapter.files import Unreadable, escaped, opened, parse_object

LIMIT = 64 * 2**30  # bytes
HEADER_LIMIT = 64 * 2**20
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")


def read_tensors(path: Path, faults: list[str]) -> dict[str, Tensor]:
    """Name -> tensor, as stored. Types that are not read and empty tensors are faults, and then the answer is empty.

    Raises Unreadable for a file that is no safetensors file, or not of the length that its header says.
    """
    with opened(path, LIMIT) as (file, size):
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            if start.startswith(_PICKLES):  # asked only now: a header of 1152 bytes begins like a pickle, too
                raise Unreadable(f"{path.name}: a pickle under another name; it can run any code and is never opened")
            raise Unreadable(f"{path.name}: broken or truncated ({size} bytes, the header says it has {length})")
        if length > HEADER_LIMIT:
            raise Unreadable(f"{path.name}: a header of {length} bytes, at most {HEADER_LIMIT} are read")
        header = file.read(length)
        entries = _entries(header, path.name)
        bytes_told = sum(math.prod(entry["shape"]) * _SIZES.get(entry["dtype"], 0) for entry in entries.values())
        if not _readable(entries, faults):
            return {}
        if 8 + length + bytes_told != size:
            told = f"{size} bytes, its header tells of {8 + length + bytes_told}"
            raise Unreadable(f"{path.name}: broken or truncated ({told})")
        return _tensors(start + header + file.read(bytes_told), path.name)


def _tensors(raw: bytes, name: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(raw)
    except (SafetensorError, KeyError, RuntimeError, ValueError, OverflowError) as error:
        raise Unreadable(f"{name}: broken or truncated ({escaped(str(error))})") from error


def _entries(header: bytes, name: str) -> dict[str, dict[str, Any]]:
    """Tensor name -> its entry. Raises Unreadable for entries that are not of the form of the format."""
    entries = parse_object(header, f"{name} (header)")
    entries.pop("__metadata__", None)
    odd = [f"{key!r:.200}" for key, entry in entries.items() if not _is_entry(entry)]
    if odd:
        faults: list[str] = []
        add_fault(faults, f"{name}: broken (entries without dtype, shape and data_offsets)", odd)
        raise Unreadable(faults[0])
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    numbers = [entry["shape"], entry["data_offsets"]]
    if not isinstance(entry["dtype"], str) or not all(isinstance(each, list) for each in numbers):
        return False
    return all(type(number) is int and 0 <= number < 2**63 for each in numbers for number in each)


def _readable(entries: dict[str, dict[str, Any]], faults: list[str]) -> bool:
    """Whether all tensors are of a type that is read and none is empty; else `faults` has more."""
    shown = {f"{key!r:.200}": entry for key, entry in entries.items()}
    typed = [f"{key} ({escaped(entry['dtype'], 20)})" for key, entry in shown.items() if entry["dtype"] not in _SIZES]
    empty = [f"{key} {entry['shape']!s:.80}" for key, entry in shown.items() if 0 in entry["shape"]]
    add_fault(faults, f"types of numbers that are not read (wanted {', '.join(_SIZES)})", typed)
    add_fault(faults, "empty tensors", empty)
    return not typed and not empty
