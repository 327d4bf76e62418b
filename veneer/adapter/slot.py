"""What fills a slot: methods by module path, new ones from settings, or those of a saved adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from veneer.adapter import patterns as patterns_of_peft
from veneer.adapter.card import Adapter
from veneer.adapter.experts import together
from veneer.adapter.targets import find_targets, left_out, named_paths
from veneer.adapter.tokens import rows_from_adapter, rows_from_settings, start_of, tell_tied
from veneer.adapter.verify import check_base
from veneer.bases.base import Base
from veneer.bases.lookup import Lookup
from veneer.bases.stacked import Stacked
from veneer.config import LoraSettings
from veneer.errors import AdapterError, ConfigError, listed
from veneer.methods import method_class
from veneer.methods.anchored import AnchoredLoRA
from veneer.methods.base import Method
from veneer.methods.dora import DoRA
from veneer.methods.experts import ExpertLoRA
from veneer.methods.init import INITS
from veneer.methods.lora import LoRA
from veneer.model import fingerprint as fingerprints
from veneer.model.experts import is_experts
from veneer.model.swap import base_at
from veneer.notes import tell


def from_settings(model: nn.Module, settings: LoraSettings, seed: int, added: Sequence[int] = ()) -> dict[str, Method]:
    """added: the ids of its new tokens."""
    targets = find_targets(model, settings)
    _check_experts(model, settings, targets)
    if settings.target_modules == "all-linear":
        for note in left_out(model, targets):
            tell(note)
    for option, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        if patterns:
            named_paths(targets, list(patterns), option)
    ranks = patterns_of_peft.resolve(settings.rank_pattern, targets, settings.r)
    alphas = patterns_of_peft.resolve(settings.alpha_pattern, targets, settings.lora_alpha)
    tell_tied(model, targets)
    made = {path: _new(model, path, settings, ranks[path], alphas[path], seed) for path in targets}
    return made | rows_from_settings(model, settings, targets, added)


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


def _new(model: nn.Module, path: str, settings: LoraSettings, rank: int, alpha: float, seed: int) -> Method:
    base = base_at(model, path)
    start = start_of(base, settings, path)
    scale = settings.scale_at(rank, alpha)
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


def from_adapter(model: nn.Module, adapter: Adapter) -> dict[str, Method]:
    for note in check_base(adapter, model, fingerprints.of(model)):
        tell(note)
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
