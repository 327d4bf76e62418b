"""adapter_model.safetensors of a LoRA, read strictly: everything in it is a complete pair of factors, or a fault."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from veneer.adapter.faults import MODULE, add_fault, chains, finite
from veneer.adapter.files import Unreadable, parse_object, read_whole

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LIMIT = 64 * 2**30  # bytes
_DTYPES = ("F32", "F16", "BF16", "F64")
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
# PEFT's names -> ours; beside the factors, the vectors of the methods that have one
VECTORS = {"lora_magnitude_vector": "m", "lora_B.bias": "c", "base_layer.bias": "o"}
KINDS = {"lora_A.weight": "a", "lora_B.weight": "b", **VECTORS}
_FOREIGN_KEYS = {
    "lora_embedding_": "an adapted embedding",
    "modules_to_save": "modules_to_save",
    "token_adapter": "trainable tokens",
    "base_layer": "base weights inside the adapter; save with save_embedding_layers=False",
}


def read_modules(folder: Path, faults: list[str]) -> dict[str, dict[str, Tensor]]:
    """Module path -> kind (a, b, a vector) -> tensor in float32, as stored. Incomplete and broken modules are faults,
    and left out."""
    found: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in _read_tensors(folder, faults).items():
        name = next((name for name in KINDS if key.endswith(f".{name}")), "")
        module = key.removesuffix(f".{name}").removeprefix(PREFIX) if name and key.startswith(PREFIX) else ""
        if MODULE.fullmatch(module):
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
    return {module: held for module, held in whole.items() if module not in bad}


def _stranger(key: str) -> str:
    kinds = [kind for part, kind in _FOREIGN_KEYS.items() if part in key]
    return f"{key!r:.200}" + (f" ({kinds[0]})" if kinds else "")


def _read_tensors(folder: Path, faults: list[str]) -> dict[str, Tensor]:
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles and not (folder / WEIGHTS).exists():
        faults.append(f"{pickles[0]}: a pickle can run any code and is never opened; save it as {WEIGHTS}")
        return {}
    try:
        raw = read_whole(folder / WEIGHTS, _LIMIT)
        if raw[:2] in (b"\x80\x02", b"\x80\x04", b"PK"):
            raise Unreadable(f"{WEIGHTS}: a pickle under another name; it can run any code and is never opened")
        tensors = safetensors.torch.load(raw) if _check_header(raw, faults) else {}
    except Unreadable as error:
        faults.append(str(error))
        return {}
    except (SafetensorError, KeyError, RuntimeError, ValueError, OverflowError) as error:
        faults.append(f"{WEIGHTS}: broken or truncated ({error})")
        return {}
    tensors = {key: tensor.to(torch.float32) for key, tensor in tensors.items()}
    add_fault(faults, "NaN or infinite values", [f"{key!r:.200}" for key, t in tensors.items() if not finite(t)])
    if not tensors and not faults:
        faults.append(f"{WEIGHTS}: no tensors")
    return tensors


def _check_header(raw: bytes, faults: list[str]) -> bool:
    """Find what safetensors accepts and we do not: repeated keys, other types, empty tensors. True if all is well."""
    safetensors.deserialize(raw)  # lengths, offsets and overlaps
    header = parse_object(raw[8 : 8 + int.from_bytes(raw[:8], "little")], f"{WEIGHTS} (header)")
    header.pop("__metadata__", None)
    entries = {f"{key!r:.200}": entry for key, entry in header.items()}
    typed = [f"{key} ({entry['dtype']})" for key, entry in entries.items() if entry["dtype"] not in _DTYPES]
    empty = [f"{key} {entry['shape']}" for key, entry in entries.items() if 0 in entry["shape"]]
    add_fault(faults, f"types of numbers that are not read (wanted {', '.join(_DTYPES)})", typed)
    add_fault(faults, "empty tensors", empty)
    return not typed and not empty
