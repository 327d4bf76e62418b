"""64 values of every tensor of a checkpoint file, read without reading the file.

The file is mapped, so only the pages that hold a sampled value are touched.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veneer.errors import ModelError, listed

PER_TENSOR = 64
FLOAT = "float"  # the kind of every sample that could be widened to float32
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_SAFETENSORS_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_SAFETENSORS_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
                      "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
_GGUF_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


@dataclass(frozen=True)
class Sample:
    """What is read of one tensor.

    kind: "float" where `data` holds float32 values, else the stored type's name and `data` holds raw bytes.
    data: the values (or raw blocks) at `positions(number of elements)`, little-endian.
    """

    shape: tuple[int, ...]
    kind: str
    data: bytes


def positions(n: int) -> np.ndarray:
    """The sampled positions in a flattened tensor of `n` elements: ascending, a pure function of `n`.

    All of them up to 64 elements; above, Fibonacci hashing spreads 64 over the tensor. Equal strides would do so
    too, but would often be a multiple of the row length and then see one column only.
    """
    if n <= PER_TENSOR:
        return np.arange(n)
    golden = 0x9E3779B97F4A7C15
    return np.unique([((i + 1) * golden % 2**64) * n >> 64 for i in range(PER_TENSOR)])


def samples_of(file: Path) -> dict[str, Sample]:
    """Samples of every tensor of a safetensors or GGUF file, under the stored names. Raises ModelError."""
    with _mapped(file) as data:
        try:
            return dict(_gguf(data) if data[:4] == b"GGUF" else _safetensors(data))
        except (struct.error, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{file}: not a complete safetensors or GGUF file ({type(error).__name__}: {error}). "
                "Download or convert the checkpoint again."
            ) from error


@contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap]:
    try:
        with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except (OSError, ValueError) as error:
        raise ModelError(listed("A checkpoint file cannot be read:", [f"{file}: {error}"])) from error


def _values(data: mmap.mmap, start: int, count: int, dtype: str, is_bf16: bool) -> bytes:
    """float32 bytes of the sampled elements of a plain float tensor that begins at byte `start`."""
    picked = np.frombuffer(data, dtype, count, start)[positions(count)]
    if is_bf16:  # a bfloat16 is the upper half of a float32
        return (picked.astype("<u4") << 16).tobytes()
    with np.errstate(over="ignore"):
        return picked.astype("<f4").tobytes()


def _blocks(data: mmap.mmap, start: int, count: int, per_block: int, block_bytes: int) -> bytes:
    """Raw bytes of the blocks that hold the sampled elements."""
    blocks = np.frombuffer(data, np.uint8, count // per_block * block_bytes, start).reshape(-1, block_bytes)
    return blocks[np.unique(positions(count) // per_block)].tobytes()


def _safetensors(data: mmap.mmap) -> Iterator[tuple[str, Sample]]:
    (header_bytes,) = struct.unpack("<Q", data[:8])
    if header_bytes > _SAFETENSORS_HEADER_LIMIT:
        raise ValueError(f"header of {header_bytes} bytes")
    header: dict[str, Any] = json.loads(data[8 : 8 + header_bytes])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        start, count = 8 + header_bytes + begin, math.prod(shape)
        if kind in _SAFETENSORS_BYTES and end - begin != count * _SAFETENSORS_BYTES[kind]:
            raise ValueError(f"tensor {name!r} of shape {shape} and type {kind} in {end - begin} bytes")
        if count == 0:
            yield name, Sample(shape, kind, b"")
        elif kind in _SAFETENSORS_FLOATS:
            yield name, Sample(shape, FLOAT, _values(data, start, count, _SAFETENSORS_FLOATS[kind], kind == "BF16"))
        else:  # a type of less than one byte an element is sampled by bytes
            yield name, Sample(shape, kind, _blocks(data, start, end - begin, 1, 1))


def _gguf(data: mmap.mmap) -> Iterator[tuple[str, Sample]]:
    """Own reader of the header: gguf.GGUFReader wraps every token of the vocabulary in arrays, which takes seconds."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # heavy

    _, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}, wanted 2 or 3")
    at, alignment = 24, 32
    for _ in range(n_keys):
        key, at = _gguf_string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        if key == "general.alignment":
            (alignment,) = struct.unpack_from("<I", data, at + 4)
        at = _after_gguf_value(data, at + 4, kind)
    entries = []
    for _ in range(n_tensors):
        name, at = _gguf_string(data, at)
        (n_dims,) = struct.unpack_from("<I", data, at)
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, at + 4)
        at += 4 + 8 * n_dims + 12
        entries.append((name, tuple(reversed(dims)), GGMLQuantizationType(kind), offset))
    origin = -(-at // alignment) * alignment
    for name, shape, kind, offset in entries:
        count, start = math.prod(shape), origin + offset
        if kind.name in _GGUF_FLOATS:
            values = _values(data, start, count, _GGUF_FLOATS[kind.name], kind.name == "BF16")
            yield name, Sample(shape, FLOAT, values)
        else:
            yield name, Sample(shape, kind.name, _blocks(data, start, count, *GGML_QUANT_SIZES[kind]))


def _gguf_string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    return data[at + 8 : end].decode(), end


def _after_gguf_value(data: mmap.mmap, at: int, kind: int) -> int:
    """The byte after a metadata value of type `kind` that begins at `at`."""
    if kind == _GGUF_STRING:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if kind != _GGUF_ARRAY:
        return at + struct.calcsize("<" + _GGUF_SCALARS[kind])
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in _GGUF_SCALARS:
        return at + count * struct.calcsize("<" + _GGUF_SCALARS[item])
    for _ in range(count):
        at = _after_gguf_value(data, at, item)
    return at
