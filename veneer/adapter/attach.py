"""Puts adapters on a model, reads them back, takes them off.

The model object stays the same one; a second name fills a second slot without swapping leaves again.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from veneer.adapter import patterns as patterns_of_peft
from veneer.adapter.card import Adapter, Card
from veneer.adapter.experts import numbered, together
from veneer.adapter.files import escaped
from veneer.adapter.tokens import (
    about_vocabulary,
    check_merge,
    rows_from_adapter,
    rows_from_settings,
    start_of,
    tell_tied,
    tie_weights,
)
from veneer.adapter.verify import check_base
from veneer.bases.base import Base
from veneer.bases.lookup import Lookup
from veneer.bases.stacked import Stacked
from veneer.bases.transposed import Transposed
from veneer.config import SWITCHES, LoraSettings
from veneer.errors import AdapterError, ConfigError, ModelError, NotMergeable, listed, nearest
from veneer.methods import method_class
from veneer.methods.anchored import AnchoredLoRA
from veneer.methods.base import Method
from veneer.methods.dora import DoRA
from veneer.methods.experts import ExpertLoRA
from veneer.methods.init import INITS
from veneer.methods.lora import LoRA
from veneer.methods.rows import TokenRows
from veneer.model import fingerprint as fingerprints
from veneer.model.experts import expert_parameters, expert_paths, experts_note, is_experts, why_not
from veneer.model.leaf import Slotted
from veneer.model.packed import wiring_of
from veneer.model.probe import probe
from veneer.model.swap import base_at, check_adaptable, leaf_at, linear_paths, tie_rows, unswap
from veneer.model.text import text_modules
from veneer.model.vocabulary import embedding_path, head_path

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
    tie_rows(model)
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
        for module, held in _kept(path, method).items():
            tensors |= {f"{module}.{kind}": tensor.cpu().contiguous() for kind, tensor in held.items()}
    return Adapter(tensors, _card(model, methods, base_name, storage, training or {}))


def _kept_as(path: str, method: Method) -> list[str]:
    """The modules that a method is in an adapter: one, or one for each expert."""
    return numbered(path, method.experts) if isinstance(method, ExpertLoRA) else [path]


def _kept(path: str, method: Method) -> dict[str, dict[str, torch.Tensor]]:
    """What an adapter keeps of a method, by module."""
    held, modules = method.tensors(), _kept_as(path, method)
    if not isinstance(method, ExpertLoRA):
        return {path: held}
    return {module: {kind: t[e] for kind, t in held.items()} for e, module in enumerate(modules)}


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
            del leaf_at(model, path).slots[slot]
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
    model.veneer_fingerprint = fingerprints.Fingerprint("unknown", "unknown", "unknown", "unknown")  # other weights now
    return detach(model, name)


def _need_dense(model: nn.Module, name: str) -> None:
    storages = {base_at(model, path).storage for path in methods_of(model, name)} - {"dense"}
    if storages:
        raise NotMergeable(
            f"the base is stored as {', '.join(sorted(storages))}: rounding base + update to that would take most of "
            "the update. Next: keep the adapter beside it, or merge into the dense base (veneer merge --into-base)"
        )


def _unadapted(model: nn.Module) -> dict[str, str]:
    """Path -> why no adapter goes on what stands there, for what users name that is no linear layer to us."""
    reasons = {path: reason for path in expert_parameters(model) if (reason := why_not(model, path))}
    inside = text_modules(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            reasons[path] = "an embedding of something else than tokens, which stays frozen"
        elif module not in inside and isinstance(module, nn.Linear):
            reasons[path] = "not of the language model, and trained is on text"
    return reasons


def find_targets(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Paths of the layers and of the experts' parameters that the settings name, in the model's order.

    The token embedding and the vocabulary head are adapted where they are named, 'all-linear' does not mean them. A
    name in target_modules means layers where it is that of any, as to PEFT, and experts where it is of none.
    Raises ConfigError with every target that matches nothing.
    """
    linear, experts, ends = linear_paths(model), expert_paths(model), (embedding_path(model), head_path(model))
    layers = [path for path in (ends[0], *linear, ends[1]) if path is not None]
    everything = settings.target_modules == "all-linear"
    chosen = linear if everything else _modules(model, settings.target_modules, layers, experts)
    if settings.target_parameters:
        chosen = [*chosen, *_named(experts, settings.target_parameters, "target_parameters", _unadapted(model))]
    if settings.exclude_modules:
        excluded = set(_named([*layers, *experts], settings.exclude_modules, "exclude_modules"))
        chosen = [path for path in chosen if path not in excluded]
    if not chosen:
        raise ConfigError("no linear layer is left to adapt after exclude_modules, and no experts")
    return [path for path in (*layers, *experts) if path in set(chosen)]


def _modules(model: nn.Module, targets: Sequence[str], layers: Sequence[str], experts: Sequence[str]) -> list[str]:
    """What target_modules means."""
    of_layers = [target for target in targets if _matched(target, layers, "target_modules")]
    for target in of_layers:
        if also := _matched(target, experts, "target_modules"):
            kind = ".".join(also[0].split(".")[-2:])
            warnings.warn(
                f"target_modules: {target!r} names linear layers here; {kind} stays as it is "
                f"(--target-parameters {kind} adapts it)",
                UserWarning,
                stacklevel=5,
            )
    others = [target for target in targets if target not in of_layers]
    chosen = _named(layers, of_layers, "target_modules")
    return [*chosen, *_named([*layers, *experts], others, "target_modules", _unadapted(model))]


def _matched(pattern: str, paths: Sequence[str], option: str) -> list[str]:
    try:
        return patterns_of_peft.matched(pattern, paths)
    except patterns_of_peft.TooCostly as error:
        raise ConfigError(f"{option}: {error}") from error


def _named(
    paths: Sequence[str], patterns: Sequence[str], option: str, unadapted: Mapping[str, str] | None = None
) -> list[str]:
    """The paths that any pattern names, in the model's order. Raises ConfigError with every pattern that names none.

    unadapted: path -> why it is none of `paths`.
    """
    hits = {pattern: _matched(pattern, paths, option) for pattern in patterns}
    missed = [pattern for pattern, found in hits.items() if not found]
    if missed:
        kinds = sorted({path.rpartition(".")[2] for path in paths})
        wanted = "parameter of experts" if option == "target_parameters" else "linear layer"
        faults = [f"{p!r} matches no {wanted}{_why(p, unadapted or {}) or _near(p, kinds)}" for p in missed]
        has = f"{', '.join(kinds)} (or a whole path such as {paths[0]})" if paths else f"no {wanted} to adapt"
        raise ConfigError(listed(f"{option}:", faults, f"This model has: {has}."))
    hit = {path for found in hits.values() for path in found}
    return [path for path in paths if path in hit]


def _why(pattern: str, unadapted: Mapping[str, str]) -> str:
    found = patterns_of_peft.matched(pattern, list(unadapted))
    return f": {found[0]} is {unadapted[found[0]]}" if found else ""


def _near(word: str, kinds: Sequence[str]) -> str:
    close = nearest(word, kinds)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def _from_settings(model: nn.Module, settings: LoraSettings, seed: int) -> dict[str, Method]:
    targets = find_targets(model, settings)
    _check_experts(model, settings, targets)
    if settings.target_modules == "all-linear":
        for note in _left_out(model, targets):
            warnings.warn(note, UserWarning, stacklevel=3)
    for option, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        if patterns:
            _named(targets, list(patterns), option)
    ranks = patterns_of_peft.resolve(settings.rank_pattern, targets, settings.r)
    alphas = patterns_of_peft.resolve(settings.alpha_pattern, targets, settings.lora_alpha)
    tell_tied(model, targets)
    made = {path: _new(model, path, settings, ranks[path], alphas[path], seed) for path in targets}
    return made | rows_from_settings(model, settings, targets)


def _check_experts(model: nn.Module, settings: LoraSettings, targets: Sequence[str]) -> None:
    """Raises ConfigError with every setting that has no meaning for experts, where the targets include some."""
    experts = [path for path in targets if is_experts(model, path)]
    faults = []
    if settings.lora_dropout:
        faults.append(f"lora_dropout {settings.lora_dropout:g}: PEFT has none there; next: --lora-dropout 0")
    if settings.method != "lora":
        faults.append(f"method {settings.method}: next: --method lora")
    if INITS[settings.init_lora_weights].anchored:
        faults.append(f"init_lora_weights {settings.init_lora_weights}: next: --init-lora-weights kaiming")
    if experts and faults:
        told = f"{experts[0]} is one parameter of all experts of a layer, which has plain LoRA and nothing else:"
        raise ConfigError(listed(told, faults, "Or leave the experts out of the targets."))


def _left_out(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """What 'all-linear' does not mean, though one could think so."""
    notes = []
    experts = experts_note(model)
    if experts and not any(is_experts(model, path) for path in targets):
        how = " (--target-parameters adapts them)" if expert_paths(model) else ""
        notes.append(f"all-linear: {experts} and stay as they are{how}; adapted is what all tokens pass")
    inside = text_modules(model)
    others = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and m not in inside]
    if others:
        parts = sorted({path.removeprefix("model.").partition(".")[0] for path in others})
        notes.append(f"all-linear: of {', '.join(parts)} nothing is adapted ({len(others)} layers); trained is on text")
    return notes


def _new(model: nn.Module, path: str, settings: LoraSettings, rank: int, alpha: float, seed: int) -> Method:
    base = base_at(model, path)
    start = start_of(base, settings, path)
    scale = settings.scale if settings.scale is not None else alpha / (rank**0.5 if settings.use_rslora else rank)
    generator = torch.Generator().manual_seed(_module_seed(seed, path))
    if isinstance(base, Stacked):
        shape_OI = torch.empty(base.out_features, base.in_features, device="meta")
        each = [start.factors(shape_OI, rank, scale, generator) for _ in range(len(base.w_EOI))]
        a_ERI, b_EOR = map(torch.stack, zip(*each, strict=True))
        return ExpertLoRA(a_ERI, b_EOR, scale)
    try:
        a_RI, b_OR = start.factors(_start_weight(base, start.anchored), rank, scale, generator)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; next: a lower --r, or another --init-lora-weights") from error
    if settings.method == "dora":
        return DoRA(a_RI, b_OR, base.row_norms().cpu(), scale, settings.lora_dropout)
    kind = AnchoredLoRA if start.anchored else LoRA
    return kind(a_RI, b_OR, scale, 0.0 if isinstance(base, Lookup) else settings.lora_dropout)


def _start_weight(base: Base, values: bool) -> torch.Tensor:
    """What a start is given: the weight; of a quantised layer its shape alone where the start looks at no values."""
    if base.storage != "dense":
        return base.dense() if values else torch.empty(base.out_features, base.in_features, device="meta")
    return base.decode()


def _module_seed(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:8], "little") >> 1


def _from_adapter(model: nn.Module, adapter: Adapter) -> dict[str, Method]:
    for note in check_base(adapter, model, fingerprints.of(model)):
        warnings.warn(note, UserWarning, stacklevel=4)
    dropout = float(adapter.card.settings.get("lora_dropout", 0.0))
    method, scales = method_class(adapter.card.method), adapter.card.scales
    try:
        modules = together({path: adapter.of(path) for path in adapter.modules()})
    except ValueError as error:
        raise AdapterError(f"{error}. Next: train it anew, or attach it where it was made.") from error
    made: dict[str, Method] = {}
    for path, held in modules.items():
        if held["a"].dim() == 3:
            made[path] = ExpertLoRA.from_tensors(held, scales.get(f"{path}.0", 1.0))
        else:
            made[path] = method.from_tensors(held, scales.get(path, 1.0), dropout)
    return made | rows_from_adapter(model, adapter)


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
    ends = (embedding_path(model), head_path(model))  # always dense: they tell nothing
    inner = [path for path in methods if path not in ends] or list(methods)
    kinds = sorted({base_at(model, path).storage for path in inner})
    return f"{'+'.join(kinds)} {str(model.dtype).removeprefix('torch.')}"


def _card(model: nn.Module, methods: dict[str, Method], base_name: str, storage: str, training: dict) -> Card:
    told = about_vocabulary(model, methods)
    methods = {path: method for path, method in methods.items() if not isinstance(method, TokenRows)}
    modules = {module: method for path, method in methods.items() for module in _kept_as(path, method)}
    ranks = {module: method.rank for module, method in modules.items()}
    scales = {module: method.scale for module, method in modules.items()}
    settings: dict[str, Any] = {"lora_dropout": max((method.dropout for method in methods.values()), default=0.0)}
    settings |= told
    if any(isinstance(base_at(model, path), Transposed) for path in methods):
        settings["fan_in_fan_out"] = True  # PEFT's name for it
    return Card(
        method=next((method.name for method in methods.values()), "lora"),
        settings=settings,
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
