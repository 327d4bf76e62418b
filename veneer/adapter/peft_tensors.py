"""adapter_model.safetensors of a LoRA, read strictly: everything in it is a complete pair of factors, or a fault."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapter.faults import add_fault, chains, finite, is_module
from veneer.adapter.files import Unreadable
from veneer.adapter.peft_vocabulary import PREFIX, Vocabulary, taken_out
from veneer.adapter.weights import read_tensors

WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
# PEFT's names -> ours; beside the factors, the vectors of the methods that have one
VECTORS = {"lora_magnitude_vector": "m", "lora_B.bias": "c", "base_layer.bias": "o"}
KINDS = {"lora_A.weight": "a", "lora_B.weight": "b", **VECTORS}
_ENDS = (".lora_A.weight", ".lora_B.weight")
_FOREIGN_KEYS = {
    "lora_embedding_": "an adapted embedding whose factors stand under two names",
    "modules_to_save": "modules_to_save",
    "token_adapter": "trainable tokens",
    "base_layer": "base weights inside the adapter; save with save_embedding_layers=False",
}


def read_modules(folder: Path, faults: list[str]) -> tuple[dict[str, dict[str, Tensor]], Vocabulary]:
    """Module path -> kind (a, b, a vector) -> tensor in float32, as stored; and what is of embedding and head alone.
    Incomplete and broken modules are faults, and left out."""
    found: dict[str, dict[str, Tensor]] = {}
    strangers = []
    tensors, vocabulary = taken_out(_read_tensors(folder, faults), faults)
    for key, tensor in tensors.items():
        name = next((name for name in KINDS if key.endswith(f".{name}")), "")
        module = key.removesuffix(f".{name}").removeprefix(PREFIX) if name and key.startswith(PREFIX) else ""
        if is_module(module):
            found.setdefault(module, {})[KINDS[name]] = tensor
        else:
            strangers.append(_stranger(key))
    wanted = f"wanted {PREFIX}<module>.lora_A.weight or .lora_B.weight"
    add_fault(faults, f"keys that are not understood ({wanted})", strangers)
    whole = {}
    for name, kind in KINDS.items():
        if name in VECTORS and not any(kind in held for held in found.values()):
            continue
        lacking = [module for module, held in found.items() if kind not in held]
        others = {"a": "lora_B", "b": "lora_A"}.get(kind, "factors")
        add_fault(faults, f"{others} without {name.removesuffix('.weight')}", lacking)
        whole = {module: found[module] for module in sorted(found) if module not in lacking}
        found = whole
    whole = {module: {kind: held[kind] for kind in KINDS.values() if kind in held} for module, held in whole.items()}
    bad = {module: held for module, held in whole.items() if not chains(*held.values())}
    told = [f"{m} ({', '.join(f'{k.upper()} {list(t.shape)}' for k, t in held.items())})" for m, held in bad.items()]
    add_fault(faults, "shapes do not chain (wanted A [r, in] and B [out, r])", told)
    return {module: held for module, held in whole.items() if module not in bad}, vocabulary


def _stranger(key: str) -> str:
    kinds = [kind for part, kind in _FOREIGN_KEYS.items() if part in key]
    if key.endswith(_ENDS) and not key.startswith(PREFIX):
        kinds.append(f"no {PREFIX!r} before it")
    elif not key.endswith(_ENDS) and key.lower().endswith(tuple(map(str.lower, _ENDS))):
        kinds.append("letters of another case")
    return f"{key!r:.200}" + (f" ({kinds[0]})" if kinds else "")


def _read_tensors(folder: Path, faults: list[str]) -> dict[str, Tensor]:
    pickles = [name for name in _PICKLES if os.path.lexists(folder / name)]
    if pickles and not os.path.lexists(folder / WEIGHTS):
        faults.append(f"{pickles[0]}: a pickle can run any code and is never opened; save it as {WEIGHTS}")
        return {}
    try:
        tensors = read_tensors(folder / WEIGHTS, faults)
    except Unreadable as error:
        faults.append(str(error))
        return {}
    tensors = {key: tensor.to(torch.float32) for key, tensor in tensors.items()}
    add_fault(faults, "NaN or infinite values", [f"{key!r:.200}" for key, t in tensors.items() if not finite(t)])
    if not tensors and not faults:
        faults.append(f"{WEIGHTS}: no tensors")
    return tensors
