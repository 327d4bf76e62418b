"""One frozen weight, by how it is stored; the table of storages."""

from __future__ import annotations

# name -> "module:class"; a storage is its file, its line here, and the laws in tests/contract/test_bases.py.
BASES: dict[str, str] = {
    "dense": "veneer.bases.dense:Dense",
    "nf4": "veneer.bases.nf4:NF4",
    "nf4-dq": "veneer.bases.nf4:NF4Double",
}
