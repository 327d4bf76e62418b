"""Whether an adapter belongs on a base model: the check that stands before every attach, merge and serve.

PEFT loads an adapter onto other weights, or onto a model with fewer layers, without a word.
Legend: I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from veneer.adapter.card import Adapter
from veneer.adapter.experts import numbered, parameter_of
from veneer.adapter.faults import add_fault
from veneer.adapter.patterns import TooCostly, named
from veneer.adapter.tokens import unfit_vocabulary
from veneer.bases.base import Base
from veneer.errors import WrongBaseError, listed
from veneer.model.experts import expert_paths
from veneer.model.fingerprint import UNKNOWN, Fingerprint, compare
from veneer.model.swap import base_at

_MEANING = {
    "weights": "other weights: another model, revision or fine-tune",
    "architecture": "another architecture or other settings, such as the number of layers or the rotary embedding",
    "tokenizer": "another tokenizer: the same text becomes other token ids",
}


def check_base(adapter: Adapter, model: nn.Module, fingerprint: Fingerprint) -> list[str]:
    """Notes for the user on an adapter and the base model that it is to be put on; usually none.

    fingerprint: the model's. A part that either side does not know is one note, and so is another chat template.
    Raises WrongBaseError with every difference: fingerprint, modules that are missing, modules that have no factors
    though the adapter's targets mean them, and shapes that do not fit.
    """
    recorded = adapter.card.base or Fingerprint()
    differences = {difference.part: difference for difference in compare(recorded, fingerprint)}
    faults = [
        f"{part}: adapter {differences[part].adapter[:12]}, model {differences[part].model[:12]} ({meaning})"
        for part, meaning in _MEANING.items()
        if part in differences
    ]
    notes = _unverified(adapter, recorded, fingerprint)
    if "template" in differences:
        notes.append("chat template: the adapter was trained with another one than this tokenizer's")
    linear = {path: shape for path, module in model.named_modules() if (shape := _shape_OI(module))}
    experts = _expert_shapes(model)
    faults += [*_unfit(adapter, linear | experts), *_partly(adapter, list(experts)), *unfit_vocabulary(adapter, model)]
    if recorded.architecture == UNKNOWN:  # else the fingerprint has told
        parameters = sorted({parameter_of(module) or "" for module in experts})
        faults += _uncovered(adapter, "target_modules", sorted(linear), notes)
        faults += _uncovered(adapter, "target_parameters", parameters, notes)
    if faults:
        name = adapter.card.base_name
        next_step = f"Load the base it was trained on{f' ({name!r})' if name else ''}, or train it for this one."
        raise WrongBaseError(listed("The adapter does not belong on this base model:", faults, next_step))
    return notes


def _unverified(adapter: Adapter, recorded: Fingerprint, model: Fingerprint) -> list[str]:
    """One note on all that could not be compared; the template is not worth one."""
    if adapter.card.base is None:
        return ["base unverified: the adapter does not record which base it was trained on"]
    recorded_parts, model_parts = recorded.to_json(), model.to_json()
    reasons = [
        f"{part} unknown for the {side}"
        for part in _MEANING
        for side, parts in (("adapter", recorded_parts), ("model", model_parts))
        if parts[part] == UNKNOWN
    ]
    return [f"base unverified: {', '.join(reasons)}"] if reasons else []


def _shape_OI(module: Any) -> tuple[int, int] | None:
    """(O, I) of a linear layer, an embedding being one over tokens; None for anything else, and for the weight inside
    a leaf."""
    if isinstance(module, Base):
        return None
    if isinstance(getattr(module, "out_features", None), int):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer, stored as (I, O)
        return module.nf, module.nx
    return None


def _expert_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(O, I) of each expert that can hold an adapter, under the names that it has in one."""
    bases = {path: base_at(model, path) for path in expert_paths(model)}
    counted = {path: len(base.weight) for path, base in bases.items()}
    return {
        module: (bases[path].out_features, bases[path].in_features)
        for path, count in counted.items()
        for module in numbered(path, count)
    }


def _partly(adapter: Adapter, experts: Sequence[str]) -> list[str]:
    """Layers of experts of which the adapter has some: its base had fewer experts, or it is not whole."""
    faults: list[str] = []
    begun = {parameter_of(module) for module in adapter.card.ranks} - {None}
    lacking = [m for m in experts if parameter_of(m) in begun and m not in adapter.card.ranks]
    add_fault(faults, "experts that the adapter has no factors for, though it has some of their layer", lacking)
    return faults


def _unfit(adapter: Adapter, shapes: dict[str, tuple[int, int]]) -> list[str]:
    """Adapted layers that the model lacks, or has in another shape."""
    faults: list[str] = []
    wrong = []
    for module in adapter.modules():
        a_RI, b_OR = adapter.factors(module)
        adapter_OI = (len(b_OR), a_RI.shape[1])
        if shapes.get(module, adapter_OI) != adapter_OI:
            wrong.append(f"{module} (adapter {list(adapter_OI)}, model {list(shapes[module])})")
    lacking = [m for m in adapter.modules() if m not in shapes]
    add_fault(faults, "linear layers that the model lacks", [m for m in lacking if parameter_of(m) is None])
    add_fault(faults, "experts that the model lacks", [m for m in lacking if parameter_of(m) is not None])
    if lacking and (alike := _alike(lacking[0], shapes)):
        faults.append(f"the model calls {lacking[0]} {alike}: an adapter of the same family saved under other names")
    add_fault(faults, "layers of another shape [out, in]", wrong)
    return faults


def _alike(module: str, paths: Iterable[str]) -> str | None:
    """The path that differs in a prefix such as `language_model.`, in such a part, or in capitals alone."""
    known = {_bare(path): path for path in paths}
    return known.get(_bare(module))


def _bare(path: str) -> str:
    return ".".join(part for part in path.lower().split(".") if part not in ("model", "language_model", "base_model"))


def _uncovered(adapter: Adapter, option: str, layers: Sequence[str], notes: list[str]) -> list[str]:
    """Layers of the model that the recorded targets mean but the adapter lacks: the base it comes from had fewer."""
    faults: list[str] = []
    settings = adapter.card.settings
    targets, excluded = settings.get(option), settings.get("exclude_modules")
    if not targets or targets == "all-linear" or settings.get("layers_to_transform") is not None:
        return []
    try:
        meant = set(named(targets, layers)) - set(named(excluded or [], layers))
    except TooCostly as error:
        notes.append(f"{option} not compared with the model's layers: {error}")
        return []
    held = {parameter_of(module) or module for module in adapter.card.ranks}
    uncovered = [layer for layer in layers if layer in meant and layer not in held]
    add_fault(faults, f"layers that {option} means but the adapter has no factors for", uncovered)
    return faults
