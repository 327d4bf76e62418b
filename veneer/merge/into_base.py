"""An adapter becomes part of its base: a folder that plain transformers loads, and what rounding cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.attach import attach, detach, merge_into, methods_of
from veneer.adapter.card import Adapter
from veneer.bases.base import Base
from veneer.errors import ModelError
from veneer.merge.folder import free, whole
from veneer.methods.base import Method
from veneer.model.added_tokens import added_by, tokenizer_of
from veneer.model.load import DTYPES, Loaded, load
from veneer.model.packed import speaking
from veneer.model.saving import make_dense
from veneer.model.swap import base_at
from veneer.model.text import text_config

SLOT = "merging"
PROBE_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What merging did to the weights and the logits.

    update_norm: ‖ΔW‖ over all layers. rounding_error: ‖stored - (W + ΔW)‖ / ‖ΔW‖, overall and for the worst layer, so
    that 1 means the update was lost. logits_difference: largest |merged, reloaded by transformers - base with adapter|
    on 32 tokens; logits_scale: the largest |logit| there.
    """

    output: str
    dtype: str
    layers: int
    update_norm: float
    rounding_error: float
    worst_layer: str
    worst_rounding_error: float
    logits_difference: float
    logits_scale: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


def merge_into_base(adapter_folder: str, base_model: str, output: str, dtype: str = "auto") -> MergeReport:
    """Writes base + adapter to the folder `output`: summed in float32, rounded once to `dtype`.

    dtype 'auto' is the base checkpoint's own, float32 for GGUF (whose values are not bfloat16 numbers). The sum is
    with the dense weights of the checkpoint, whatever the adapter was trained on; where the checkpoint itself is
    quantised, with the values that it stands for.
    Raises ConfigError when output holds files, WrongBaseError, NotMergeable; nothing half-written stays.
    """
    folder = free(output)
    adapter = Adapter.load(adapter_folder)
    loaded = load(base_model, "float32", device="cpu")
    chosen = _dtype(loaded.model, dtype)
    notes = _storage_notes(adapter, loaded)
    make_dense(loaded.model, torch.float32)
    attach(loaded.model, adapter, SLOT)
    tokenizer, ids = tokenizer_of(loaded, SLOT), _probe_ids(loaded.model)
    wanted = _logits(loaded.model, SLOT, ids)
    rounding = {
        path: _rounding(method, base_at(loaded.model, path), chosen)
        for path, method in methods_of(loaded.model, SLOT).items()
    }
    merge_into(loaded.model, SLOT)
    detach(loaded.model)
    loaded.model.to(chosen)
    got = _write(folder, loaded.model, tokenizer, chosen, ids)
    return _report(folder, chosen, rounding, wanted, got, notes)


def _storage_notes(adapter: Adapter, loaded: Loaded) -> list[str]:
    if not loaded.storage.startswith("dense "):
        kind = loaded.storage.split()[0]
        return [f"the base is stored as {kind}: the update is added to the values that stands for, and written dense"]
    trained = adapter.card.storage or loaded.storage
    if trained.startswith("dense "):
        return []
    return [f"the adapter was trained beside the base stored as {trained} and is merged into the dense weights"]


def _dtype(model: nn.Module, dtype: str) -> torch.dtype:
    return model.veneer_stored_dtype if dtype == "auto" else DTYPES[dtype]


def _probe_ids(model: nn.Module) -> Tensor:
    """Of the tokens that the adapter has added the first, then others all over the base's vocabulary."""
    spread = [(11 * i * i + 5) % text_config(model).vocab_size for i in range(PROBE_TOKENS)]
    added = list(added_by(model, SLOT).values())[: PROBE_TOKENS // 2]
    return torch.tensor([[*added, *spread][:PROBE_TOKENS]])


@torch.no_grad()
def _logits(model: nn.Module, slot: str | None, ids: Tensor) -> Tensor:
    if slot is None:
        return model(input_ids=ids).logits.float()
    with speaking(model, slot):
        return model(input_ids=ids).logits.float()


def _rounding(method: Method, base: Base, dtype: torch.dtype) -> tuple[float, float]:
    """‖stored - merged‖ and ‖ΔW‖ of one layer."""
    merged_OI = method.merged(base)
    error = torch.linalg.vector_norm(merged_OI.to(dtype).float() - merged_OI).item()
    return error, method.update_norm(base)


def _write(folder: Path, model: PreTrainedModel, tokenizer: Any, dtype: torch.dtype, ids: Tensor) -> Tensor:
    """Writes the model folder, whole or not at all; returns the logits of what plain transformers reads back."""
    with whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        got = _logits(type(model).from_pretrained(partial, dtype=dtype), None, ids)
        if not torch.isfinite(got).all():
            raise ModelError("the merged model gives logits that are not finite; nothing was written, keep the adapter")
    return got


Roundings = dict[str, tuple[float, float]]  # layer -> ‖stored - merged‖, ‖ΔW‖


def _report(
    folder: Path, dtype: torch.dtype, rounding: Roundings, wanted: Tensor, got: Tensor, notes: list[str]
) -> MergeReport:
    relative = {path: error / norm if norm else 0.0 for path, (error, norm) in rounding.items()}
    errors, norms = zip(*rounding.values(), strict=True)
    update = sum(norm**2 for norm in norms) ** 0.5
    worst = max(relative, key=relative.__getitem__)
    overall = (sum(error**2 for error in errors) ** 0.5) / update if update else 0.0
    if overall > 0.1:
        lost = f"rounding to {dtype} took {overall:.0%} of the update"
        notes = [*notes, f"{lost}: keep the adapter, or merge with --dtype float32"]
    return MergeReport(
        output=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        layers=len(rounding),
        update_norm=update,
        rounding_error=overall,
        worst_layer=worst,
        worst_rounding_error=relative[worst],
        logits_difference=(got - wanted).abs().max().item(),
        logits_scale=wanted.abs().max().item(),
        notes=tuple(notes),
    )
