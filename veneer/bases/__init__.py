"""One frozen weight, by how it is stored; the table of storages."""

from __future__ import annotations

# name -> "module:class"; a storage is its file, its line here, and the laws in tests/contract/test_bases.py.
BASES: dict[str, str] = {
    "dense": "veneer.bases.dense:Dense",
    "int8": "veneer.bases.int8:Int8",
    "int8-outlier": "veneer.bases.int8:Int8Outlier",
    "int4": "veneer.bases.int4:Int4",
    "nf4": "veneer.bases.nf4:NF4",
    "nf4-dq": "veneer.bases.nf4:NF4Double",
    "fp8": "veneer.bases.fp8:FP8",
}
