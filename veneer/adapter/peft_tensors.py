"""adapter_model.safetensors of a LoRA, read strictly: everything in it is a complete pair of factors, or a fault."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from veneer.adapter.faults import add_fault, chains, finite, is_module
from veneer.adapter.files import Unreadable
from veneer.adapter.weights import read_tensors

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_ENDS = (".lora_A.weight", ".lora_B.weight")
_FOREIGN_KEYS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "an adapted embedding",
    "lora_B.bias": "lora_bias",
    "modules_to_save": "modules_to_save",
    "token_adapter": "trainable tokens",
    "base_layer": "base weights inside the adapter; save with save_embedding_layers=False",
}


def read_pairs(folder: Path, faults: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (a_RI, b_OR) in float32, as stored. Incomplete and broken modules are faults and left out."""
    tensors = _read_tensors(folder, faults)
    found: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        module = match[1].removeprefix(PREFIX) if match and key.startswith(PREFIX) else ""
        if match and is_module(module):
            found.setdefault(module, {})[match[2]] = tensor
        else:
            strangers.append(_stranger(key))
    wanted = f"wanted {PREFIX}<module>.lora_A.weight or .lora_B.weight"
    add_fault(faults, f"keys that are not understood ({wanted})", strangers)
    add_fault(faults, "lora_A without lora_B", [module for module in found if "B" not in found[module]])
    add_fault(faults, "lora_B without lora_A", [module for module in found if "A" not in found[module]])
    pairs = {module: (found[module]["A"], found[module]["B"]) for module in sorted(found) if len(found[module]) == 2}
    unchained = [f"{m} (A {list(a.shape)}, B {list(b.shape)})" for m, (a, b) in pairs.items() if not chains(a, b)]
    add_fault(faults, "shapes do not chain (wanted A [r, in] and B [out, r])", unchained)
    return {module: pair for module, pair in pairs.items() if chains(*pair)}


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
