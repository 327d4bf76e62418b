"""Low-rank methods, one per file; the table of methods."""

from __future__ import annotations

# name -> "module:class"; a method is its file, its line here, its settings in config.py, and the laws in
# tests/contract/test_methods.py.
METHODS: dict[str, str] = {
    "lora": "veneer.methods.lora:LoRA",
}
