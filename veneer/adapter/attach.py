"""Puts adapters on a model, takes them off, adds them to its weights.

The model object stays the same one; a second name fills a second slot without swapping leaves again.
"""

from __future__ import annotations

import re

from torch import nn

from veneer.adapter.added import added_from_adapter, added_from_settings
from veneer.adapter.card import Adapter
from veneer.adapter.slot import from_adapter, from_settings
from veneer.adapter.tokens import check_merge, tie_weights
from veneer.config import LoraSettings
from veneer.errors import AdapterError, ConfigError, ModelError, NotMergeable
from veneer.methods.base import Method
from veneer.model import fingerprint as fingerprints
from veneer.model.leaf import Slotted
from veneer.model.packed import wiring_of
from veneer.model.probe import probe
from veneer.model.swap import base_at, check_adaptable, leaf_at, tie_rows, unswap
from veneer.model.text import text_config
from veneer.model.vocabulary import embedding_path
from veneer.notes import tell

# Told in reports, and fit to name a file on any system: no look-alikes, no paths, nothing that ends a line of a log.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RESERVED = {"base", "con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


def attach(model: nn.Module, source: Adapter | LoraSettings, name: str = "default", *, seed: int = 0) -> nn.Module:
    """Fills the slot `name` with a saved adapter, or with a new one made from settings; returns the same model.

    Ordinary calls of the model speak with the first slot attached (`veneer.model.packed.speaking` chooses another).
    A new adapter's starting values depend on the seed and the module's path alone.
    Raises WrongBaseError (an adapter of another base), ConfigError (targets that match nothing), AdapterError (name
    taken).
    """
    _check_name(model, name)
    if isinstance(source, Adapter):
        made, added = from_adapter(model, source), added_from_adapter(model, source)
    else:
        added = added_from_settings(model, source)
        made = from_settings(model, source, seed, list(added.ids.values()) if added else [])
    for path in made:
        check_adaptable(model, path)  # all before the first is swapped: attach does all or nothing
    _freeze_base(model)
    _probe_once(model)
    for path, method in made.items():
        leaf = leaf_at(model, path)
        leaf.slots[name] = method.to(leaf.weight.device)
    tie_rows(model)
    wiring = wiring_of(model)
    wiring.slots.append(name)
    if added:
        wiring.extended[name] = added
    wiring.voice = wiring.voice or name
    return model


def _probe_once(model: nn.Module) -> None:
    """A model that did not come from our loader is probed now; where that fails, ordinary calls still work."""
    if wiring_of(model).probed or not hasattr(model, "get_output_embeddings"):
        return
    wiring_of(model).probed = True
    try:
        probe(model)
    except ModelError as error:
        tell(f"no packed forward for this model, only ordinary calls: {error}")


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Takes one slot off; without a name all of them, and plain linear layers stand there again. Returns the model.

    Layers that were loaded quantised stay leaves: no plain linear layer holds their weights.
    """
    wiring = wiring_of(model)
    for slot in [name] if name is not None else list(wiring.slots):
        for path in methods_of(model, slot):
            del leaf_at(model, path).slots[slot]
        wiring.slots.remove(slot)
        wiring.extended.pop(slot, None)
    wiring.voice = wiring.voice if wiring.voice in wiring.slots else next(iter(wiring.slots), None)
    if name is None:
        unswap(model)
    return model


def methods_of(model: nn.Module, name: str) -> dict[str, Method]:
    """Module path -> method of the slot `name`, in the model's order. Raises AdapterError when there is none."""
    slots = wiring_of(model).slots
    if name not in slots:
        raise AdapterError(f"no adapter named {name!r} is attached; attached are: {', '.join(slots) or 'none'}")
    leaves = [module for module in model.modules() if isinstance(module, Slotted)]
    return {leaf.path: leaf.slots[name] for leaf in leaves if name in leaf.slots}


def merge_into(model: nn.Module, name: str = "default") -> nn.Module:
    """Adds the slot's update to the base weights (sum in float32, rounded once), takes the slot off, returns the model.

    Raises NotMergeable before anything is changed, and for a quantised base, where rounding the sum to its few values
    would take most of the update.
    """
    _need_dense(model, name)
    merged = {path: method.merged(base_at(model, path)) for path, method in methods_of(model, name).items()}
    tied = check_merge(model, methods_of(model, name), merged)
    for path, weight in merged.items():
        leaf_at(model, path).put(weight)
    if tied:
        tie_weights(model)
    if name in wiring_of(model).extended:
        text_config(model).vocab_size = len(base_at(model, str(embedding_path(model))).weight)
    model.veneer_fingerprint = fingerprints.Fingerprint("unknown", "unknown", "unknown", "unknown")  # other weights now
    return detach(model, name)


def _need_dense(model: nn.Module, name: str) -> None:
    storages = {base_at(model, path).storage for path in methods_of(model, name)} - {"dense"}
    if storages:
        raise NotMergeable(
            f"the base is stored as {', '.join(sorted(storages))}: rounding base + update to that would take most of "
            "the update. Next: keep the adapter beside it, or merge into the dense base (veneer merge --into-base)"
        )


def is_name(name: str) -> bool:
    """Whether an adapter can be attached under this name."""
    return bool(_NAME.fullmatch(name)) and not hasattr(nn.ModuleDict, name) and name.lower() not in _RESERVED


def _check_name(model: nn.Module, name: str) -> None:
    if not is_name(name):
        raise ConfigError(
            "an adapter's name is 1 to 64 of the letters a-z, A-Z, 0-9, _ and -, and not 'base', a method of a dict, "
            f"or a device of Windows; got {name!r:.80}"
        )
    if name in wiring_of(model).slots:
        raise AdapterError(
            f"a slot named {name!r} is attached already; next: veneer.detach(model, {name!r}), or another name"
        )


def _freeze_base(model: nn.Module) -> None:
    for path, parameter in model.named_parameters():
        if ".slots." not in path:
            parameter.requires_grad_(False)
