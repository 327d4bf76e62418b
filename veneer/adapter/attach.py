"""Puts adapters on a model, reads them back, takes them off.

The model object stays the same one; a second name fills a second slot without swapping leaves again.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from veneer.adapter import patterns as patterns_of_peft
from veneer.adapter.card import Adapter, Card
from veneer.adapter.files import escaped
from veneer.adapter.verify import check_base
from veneer.config import SWITCHES, LoraSettings
from veneer.errors import AdapterError, ConfigError, ModelError, NotMergeable, listed, nearest
from veneer.methods.base import Method
from veneer.methods.init import INITS
from veneer.methods.lora import LoRA
from veneer.model import fingerprint as fingerprints
from veneer.model.leaf import Leaf
from veneer.model.packed import wiring_of
from veneer.model.probe import probe
from veneer.model.swap import check_adaptable, leaf_at, linear_paths, unswap

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
    made = _from_adapter(model, source) if isinstance(source, Adapter) else _from_settings(model, source, seed)
    for path in made:
        check_adaptable(model, path)  # all before the first is swapped: attach does all or nothing
    _freeze_base(model)
    _probe_once(model)
    for path, method in made.items():
        leaf = leaf_at(model, path)
        leaf.slots[name] = method.to(leaf.weight.device)
    wiring = wiring_of(model)
    wiring.slots.append(name)
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
        warnings.warn(f"no packed forward for this model, only ordinary calls: {error}", UserWarning, stacklevel=3)


def take(
    model: nn.Module, name: str = "default", *, base_name: str = "", storage: str = "", training: dict | None = None
) -> Adapter:
    """Reads the slot `name` back as a plain adapter (scale folded in) with its card; the model is unchanged."""
    methods = methods_of(model, name)
    tensors: dict[str, torch.Tensor] = {}
    for path, method in methods.items():
        a_RI, b_OR = method.plain()
        tensors[f"{path}.a"], tensors[f"{path}.b"] = a_RI.cpu().contiguous(), b_OR.cpu().contiguous()
    return Adapter(tensors, _card(model, methods, base_name, storage, training or {}))


def storage_note(adapter: Adapter, storage: str, name: str) -> str | None:
    """What to tell where the adapter `name` learned beside a base stored otherwise than this one ('nf4 bfloat16').

    Never a fault: the weights are those of the same files, to the rounding of either storage.
    """
    recorded = adapter.card.storage or storage
    kind, trained = storage.split()[0], recorded.split()[0] if recorded.strip() else ""
    if kind == trained:
        return None
    switches = SWITCHES.get(trained, "no storage option")
    told = f"{name} was trained on a base stored as {escaped(recorded, 40)}, this one is {storage}"
    return f"{told}: answers can differ a little ({switches} loads the base as it was)"


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Takes one slot off; without a name all of them, and plain linear layers stand there again. Returns the model.

    Layers that were loaded quantised stay leaves: no plain linear layer holds their weights.
    """
    wiring = wiring_of(model)
    for slot in [name] if name is not None else list(wiring.slots):
        for path in methods_of(model, slot):
            del model.get_submodule(path).slots[slot]
        wiring.slots.remove(slot)
    wiring.voice = wiring.voice if wiring.voice in wiring.slots else next(iter(wiring.slots), None)
    if name is None:
        unswap(model)
    return model


def methods_of(model: nn.Module, name: str) -> dict[str, Method]:
    """Module path -> method of the slot `name`, in the model's order. Raises AdapterError when there is none."""
    slots = wiring_of(model).slots
    if name not in slots:
        raise AdapterError(f"no adapter named {name!r} is attached; attached are: {', '.join(slots) or 'none'}")
    return {
        path: leaf.slots[name] for path, leaf in model.named_modules() if isinstance(leaf, Leaf) and name in leaf.slots
    }


def merge_into(model: nn.Module, name: str = "default") -> nn.Module:
    """Adds the slot's update to the base weights (sum in float32, rounded once), takes the slot off, returns the model.

    Raises NotMergeable before anything is changed, and for a quantised base, where rounding the sum to its few values
    would take most of the update.
    """
    _need_dense(model, name)
    merged = {path: method.merged(model.get_submodule(path).base) for path, method in methods_of(model, name).items()}
    for path, weight_OI in merged.items():
        leaf = model.get_submodule(path)
        leaf.base = leaf.base.packed(weight_OI)
    model.veneer_fingerprint = fingerprints.Fingerprint("unknown", "unknown", "unknown", "unknown")  # other weights now
    return detach(model, name)


def _need_dense(model: nn.Module, name: str) -> None:
    storages = {model.get_submodule(path).base.storage for path in methods_of(model, name)} - {"dense"}
    if storages:
        raise NotMergeable(
            f"the base is stored as {', '.join(sorted(storages))}: rounding base + update to that would take most of "
            "the update. Next: keep the adapter beside it, or merge into the dense base (veneer merge --into-base)"
        )


def find_targets(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Paths of the linear layers that the settings name. Raises ConfigError with every target that matches nothing."""
    paths = linear_paths(model)
    chosen = (
        paths if settings.target_modules == "all-linear" else _named(paths, settings.target_modules, "target_modules")
    )
    if settings.exclude_modules:
        excluded = set(_named(paths, settings.exclude_modules, "exclude_modules"))
        chosen = [path for path in chosen if path not in excluded]
    if not chosen:
        raise ConfigError("no linear layer is left to adapt after exclude_modules")
    return chosen


def _named(paths: Sequence[str], patterns: Sequence[str], option: str) -> list[str]:
    """The paths that any pattern names, in the model's order. Raises ConfigError with every pattern that names none."""
    try:
        hits = {pattern: patterns_of_peft.matched(pattern, paths) for pattern in patterns}
    except patterns_of_peft.TooCostly as error:
        raise ConfigError(f"{option}: {error}") from error
    missed = [pattern for pattern, found in hits.items() if not found]
    if missed:
        kinds = sorted({path.rpartition(".")[2] for path in paths})
        faults = [f"{p!r} matches no linear layer{_near(p, kinds)}" for p in missed]
        raise ConfigError(
            listed(f"{option}:", faults, f"This model has: {', '.join(kinds)} (or a whole path such as {paths[0]}).")
        )
    wanted = {path for found in hits.values() for path in found}
    return [path for path in paths if path in wanted]


def _near(word: str, kinds: Sequence[str]) -> str:
    close = nearest(word, kinds)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def _from_settings(model: nn.Module, settings: LoraSettings, seed: int) -> dict[str, Method]:
    targets = find_targets(model, settings)
    for option, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        if patterns:
            _named(targets, list(patterns), option)
    ranks = patterns_of_peft.resolve(settings.rank_pattern, targets, settings.r)
    alphas = patterns_of_peft.resolve(settings.alpha_pattern, targets, settings.lora_alpha)
    return {path: _new(model, path, settings, ranks[path], alphas[path], seed) for path in targets}


def _new(model: nn.Module, path: str, settings: LoraSettings, rank: int, alpha: float, seed: int) -> LoRA:
    start = INITS[settings.init_lora_weights]
    a_RI, b_OR = start(
        _start_weight(model.get_submodule(path)), rank, torch.Generator().manual_seed(_module_seed(seed, path))
    )
    scale = settings.scale if settings.scale is not None else alpha / (rank**0.5 if settings.use_rslora else rank)
    return LoRA(a_RI, b_OR, scale, settings.lora_dropout)


def _start_weight(layer: nn.Module) -> torch.Tensor:
    """What a start is given: the weight; of a quantised layer its shape alone, for starts look at no values."""
    if isinstance(layer, Leaf) and layer.base.storage != "dense":
        return torch.empty(layer.out_features, layer.in_features, device="meta")
    return layer.weight


def _module_seed(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:8], "little") >> 1


def _from_adapter(model: nn.Module, adapter: Adapter) -> dict[str, Method]:
    for note in check_base(adapter, model, fingerprints.of(model)):
        warnings.warn(note, UserWarning, stacklevel=4)
    dropout = float(adapter.card.settings.get("lora_dropout", 0.0))
    made: dict[str, Method] = {}
    for path in adapter.modules():
        a_RI, b_OR = adapter.factors(path)
        made[path] = LoRA.from_plain(a_RI, b_OR, adapter.card.scales.get(path, 1.0), dropout)
    return made


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


def _storage(model: nn.Module, methods: dict[str, Method]) -> str:
    """How the adapted layers are stored, as in 'nf4 bfloat16'."""
    kinds = sorted({model.get_submodule(path).base.storage for path in methods})
    return f"{'+'.join(kinds)} {str(model.dtype).removeprefix('torch.')}"


def _card(model: nn.Module, methods: dict[str, Method], base_name: str, storage: str, training: dict) -> Card:
    ranks = {path: method.rank for path, method in methods.items()}
    scales = {path: method.scale for path, method in methods.items()}
    dropout = next((method.dropout for method in methods.values()), 0.0)
    return Card(
        method="lora",
        settings={"lora_dropout": dropout},
        scales=scales,
        ranks=ranks,
        base=fingerprints.of(model),
        base_name=base_name
        or getattr(getattr(model, "veneer_source", None), "name", "")
        or getattr(model, "name_or_path", ""),
        storage=storage or _storage(model, methods),
        training=training,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
