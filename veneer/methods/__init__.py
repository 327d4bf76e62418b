"""Low-rank methods, one per file; the table of methods."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.methods.base import Method

# name -> "module:class"; a method is its file, its line here, its settings in config.py, and the laws in
# tests/contract/test_methods.py.
METHODS: dict[str, str] = {
    "lora": "veneer.methods.lora:LoRA",
    "dora": "veneer.methods.dora:DoRA",
    "biased": "veneer.methods.biased:BiasedLoRA",
    "rebiased": "veneer.methods.biased:RebiasedLoRA",
}


def method_class(name: str) -> type[Method]:
    """The member of METHODS called `name`. Raises KeyError."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
