"""Reads a slot of a model back as a plain adapter, with its card."""

from __future__ import annotations

import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from veneer.adapter.added import about_added
from veneer.adapter.attach import methods_of
from veneer.adapter.card import Adapter, Card
from veneer.adapter.experts import numbered
from veneer.adapter.files import escaped
from veneer.adapter.tokens import about_vocabulary
from veneer.bases.transposed import Transposed
from veneer.config import SWITCHES
from veneer.methods.base import Method
from veneer.methods.experts import ExpertLoRA
from veneer.methods.rows import TokenRows
from veneer.model import fingerprint as fingerprints
from veneer.model.added_tokens import added_by
from veneer.model.swap import base_at
from veneer.model.vocabulary import embedding_path, head_path


def take(
    model: nn.Module, name: str = "default", *, base_name: str = "", storage: str = "", training: dict | None = None
) -> Adapter:
    """Reads the slot `name` back as a plain adapter (scale folded in) with its card; the model is unchanged."""
    methods = methods_of(model, name)
    tensors: dict[str, torch.Tensor] = {}
    for path, method in methods.items():
        for module, held in _kept(path, method).items():
            tensors |= {f"{module}.{kind}": tensor.cpu().contiguous() for kind, tensor in held.items()}
    told = about_vocabulary(model, methods) | about_added(added_by(model, name))
    return Adapter(tensors, _card(model, methods, told, base_name, storage, training or {}))


def _kept_as(path: str, method: Method) -> list[str]:
    """The modules that a method is in an adapter: one, or one for each expert."""
    return numbered(path, method.experts) if isinstance(method, ExpertLoRA) else [path]


def _kept(path: str, method: Method) -> dict[str, dict[str, torch.Tensor]]:
    """What an adapter keeps of a method, by module."""
    held, modules = method.tensors(), _kept_as(path, method)
    if not isinstance(method, ExpertLoRA):
        return {path: held}
    return {module: {kind: t[e] for kind, t in held.items()} for e, module in enumerate(modules)}


def _card(
    model: nn.Module, methods: dict[str, Method], told: dict[str, Any], base_name: str, storage: str, training: dict
) -> Card:
    """told: what settings say of the vocabulary."""
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
        veneer_version=_version(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _version() -> str:
    try:
        return version("veneer")
    except PackageNotFoundError:  # run from a folder that was never installed
        return ""


def _storage(model: nn.Module, methods: dict[str, Method]) -> str:
    """How the adapted layers are stored, as in 'nf4 bfloat16'."""
    ends = (embedding_path(model), head_path(model))  # always dense: they tell nothing
    inner = [path for path in methods if path not in ends] or list(methods)
    kinds = sorted({base_at(model, path).storage for path in inner})
    return f"{'+'.join(kinds)} {str(model.dtype).removeprefix('torch.')}"


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
