"""veneer: LoRA you can check. The public names, each loaded on first use.

    import veneer
    loaded = veneer.load("smollm2")
    model = veneer.attach(loaded.model, veneer.Lora(r=8))
    veneer.take(model).save("my-adapter")

Importing veneer imports nothing heavy, and nothing inside veneer imports this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veneer.adapter.attach import attach, detach, merge_into
    from veneer.adapter.card import Adapter
    from veneer.adapter.take import take
    from veneer.config import LoraSettings as Lora
    from veneer.config import RunConfig
    from veneer.errors import VeneerError
    from veneer.evaluate.finetune import finetune
    from veneer.model.generate import generate
    from veneer.model.load import load

    __version__: str

# public name -> "module:name"; the imports above repeat it for type checkers, and a test holds the two together.
PUBLIC: dict[str, str] = {
    "Adapter": "veneer.adapter.card:Adapter",
    "Lora": "veneer.config:LoraSettings",
    "RunConfig": "veneer.config:RunConfig",
    "VeneerError": "veneer.errors:VeneerError",
    "attach": "veneer.adapter.attach:attach",
    "detach": "veneer.adapter.attach:detach",
    "finetune": "veneer.evaluate.finetune:finetune",
    "generate": "veneer.model.generate:generate",
    "load": "veneer.model.load:load",
    "merge_into": "veneer.adapter.attach:merge_into",
    "take": "veneer.adapter.take:take",
}

__all__ = [
    "Adapter",
    "Lora",
    "RunConfig",
    "VeneerError",
    "attach",
    "detach",
    "finetune",
    "generate",
    "load",
    "merge_into",
    "take",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in PUBLIC:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}; it has {', '.join(PUBLIC)}")
    from importlib import import_module

    module, _, attribute = PUBLIC[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*PUBLIC, "__version__"])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("veneer")
    except PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"
