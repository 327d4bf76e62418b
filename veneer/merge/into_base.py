"""An adapter becomes part of its base: a folder for plain transformers, or a GGUF file; and what rounding cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter.attach import attach, detach, merge_into, methods_of
from veneer.adapter.card import Adapter
from veneer.errors import ModelError, NotMergeable
from veneer.merge.agreement import agreement, sample_prompts
from veneer.merge.folder import free, whole
from veneer.merge.rounding import Rounding, Roundings, kept, overall, rounding, store_of
from veneer.merge.written import WRITERS, Merged
from veneer.model.added_tokens import added_by, tokenizer_of
from veneer.model.load import DTYPES, Loaded, load
from veneer.model.packed import speaking
from veneer.model.saving import make_dense
from veneer.model.swap import base_at, linear_paths
from veneer.model.text import learned_positions, text_config

SLOT = "merging"
PROBE_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What merging did to the weights and to what the model says.

    update_norm: ‖ΔW‖ over all layers. rounding_error: ‖stored - (W + ΔW)‖ / ‖ΔW‖, overall and for the worst layer, so
    that 1 means the update was lost. kept: the share of ΔW in what was stored; worst_kept: the least of any layer.
    logits_difference: largest |merged, loaded again - base with adapter| on 32 tokens; logits_scale: the largest
    |logit| there. kl, worst_kl, same_choice: `veneer.merge.agreement` of base with adapter and merged model on
    sample prompts of that many positions.
    """

    output: str
    dtype: str
    layers: int
    update_norm: float
    rounding_error: float
    kept: float
    worst_layer: str
    worst_rounding_error: float
    worst_kept: float
    logits_difference: float
    logits_scale: float
    kl: float
    worst_kl: float
    same_choice: float
    positions: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


def merge_into_base(
    adapter_folder: str,
    base_model: str,
    output: str,
    dtype: str = "auto",
    form: str = "transformers",
    storage: str = "dense",
    force: bool = False,
) -> MergeReport:
    """Writes base + adapter to the folder `output`: summed in float32, rounded once to `dtype`.

    dtype 'auto' is the base checkpoint's own, float32 for GGUF (whose values are not bfloat16 numbers). The sum is
    with the dense weights of the checkpoint, whatever the adapter was trained on; where the checkpoint itself is
    quantised, with the values that it stands for. form: a name of `veneer.merge.written.WRITERS`. storage: 'nf4' or
    'nf4-dq' quantises the sum, which takes most of an update and is refused without `force`.
    Raises ConfigError when output holds files, WrongBaseError, NotMergeable; nothing half-written stays.
    """
    folder = free(output)
    adapter = Adapter.load(adapter_folder)
    loaded = load(base_model, "float32", device="cpu")
    chosen = _dtype(loaded.model, dtype)
    writer = WRITERS[form]
    writer.check(loaded.model)
    notes = _storage_notes(adapter, loaded, storage)
    make_dense(loaded.model, torch.float32)
    attach(loaded.model, adapter, SLOT)
    tokenizer = tokenizer_of(loaded, SLOT)
    most = learned_positions(loaded.model)  # of GPT-2 and its like: longer prompts are cut
    prompts = sample_prompts(tokenizer, adapter.card.system_prompt)
    samples = [_probe_ids(loaded.model), *(ids[:, :most] for ids in prompts)]
    wanted = _all_logits(loaded.model, SLOT, samples)
    layers = _roundings(loaded.model, chosen, storage)
    notes += _lost(layers, chosen, storage, force)
    merge_into(loaded.model, SLOT)
    detach(loaded.model)
    loaded.model.to(chosen)
    merged = Merged(loaded.model, tokenizer, chosen, loaded.model.veneer_source, storage, adapter.card.system_prompt)
    with whole(folder) as partial:
        notes += writer.write(partial, merged)
        got = _all_logits(writer.read(partial, merged), None, samples)
        if not all(torch.isfinite(logits).all() for logits in got):
            raise ModelError("the merged model gives logits that are not finite; nothing was written, keep the adapter")
    return _report(folder, chosen, layers, wanted, got, notes)


def _storage_notes(adapter: Adapter, loaded: Loaded, storage: str) -> list[str]:
    if not loaded.storage.startswith("dense "):
        kind = loaded.storage.split()[0]
        written = "dense" if storage == "dense" else f"as {storage}"
        return [
            f"the base is stored as {kind}: the update is added to the values that stands for, and written {written}"
        ]
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
def _all_logits(model: nn.Module, slot: str | None, samples: Sequence[Tensor]) -> list[Tensor]:
    """Logits (T, V) of each sample (1, T)."""
    if slot is None:
        return [model(input_ids=ids).logits[0].float() for ids in samples]
    with speaking(model, slot):
        return [model(input_ids=ids).logits[0].float() for ids in samples]


def _roundings(model: nn.Module, dtype: torch.dtype, storage: str) -> Roundings:
    found: dict[str, Rounding] = {}
    linear = set(linear_paths(model)) if storage != "dense" else set()
    for path, method in methods_of(model, SLOT).items():
        base = base_at(model, path)
        found[path] = rounding(method, base, store_of(base, dtype, storage if path in linear else "dense"))
    return found


def _lost(layers: Roundings, dtype: torch.dtype, storage: str, force: bool) -> list[str]:
    """Notes on what rounding takes of the update. Raises NotMergeable for 4 bits that are not forced."""
    whole = overall(layers)
    if storage == "dense":
        lost = f"rounding to {dtype} took {whole.relative:.0%} of the update"
        return [f"{lost}: keep the adapter, or merge with --dtype float32"] if whole.relative > 0.1 else []
    told = (
        f"in {storage}, {kept(whole):.1%} of the update would be kept, beside a rounding error {whole.relative:.3g} "
        "times as large as the update"
    )
    if not force:
        raise NotMergeable(
            f"{told}. Next: leave --load-in-4bit out, which writes base + update dense (add --dtype bfloat16 for half "
            "the size), keep the adapter beside the 4-bit base, or --force"
        )
    return [told.replace("would be", "is")]


def _report(
    folder: Path, dtype: torch.dtype, layers: Roundings, wanted: list[Tensor], got: list[Tensor], notes: list[str]
) -> MergeReport:
    """The first of the logits are those of the probe, the others those of the prompts."""
    total, worst = overall(layers), max(layers, key=lambda path: layers[path].relative)
    return MergeReport(
        output=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        layers=len(layers),
        update_norm=total.norm,
        rounding_error=total.relative,
        kept=kept(total),
        worst_layer=worst,
        worst_rounding_error=layers[worst].relative,
        worst_kept=min(map(kept, layers.values())),
        logits_difference=(got[0] - wanted[0]).abs().max().item(),
        logits_scale=wanted[0].abs().max().item(),
        **dataclasses.asdict(agreement(wanted[1:], got[1:])),
        notes=tuple(notes),
    )
