"""PEFT folders, in and out.

Legend: R rank, I in, O out. On disk: adapter_config.json, and adapter_model.safetensors with, for each module,
`base_model.model.<module>.lora_A.weight` (R, I) and `.lora_B.weight` (O, R). The update is s · B A. Inside veneer s is
folded into B, once, here; written out, alpha = r, so that s = 1. Some methods have a vector (O) as well, such as DoRA's
`.lora_magnitude_vector`. Experts are together there (`veneer.adapter.peft_experts`), and one module each here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from veneer.adapter import peft_config
from veneer.adapter.experts import together
from veneer.adapter.faults import add_fault, finite
from veneer.adapter.files import Unreadable, parse_object, read_whole
from veneer.adapter.peft_experts import apart, joined, unwrapped, wrapped
from veneer.adapter.peft_tensors import KINDS, VECTORS, WEIGHTS, read_modules
from veneer.adapter.peft_vocabulary import ROWS, keys_of, row_key
from veneer.methods import METHODS, method_class

CONFIG = "adapter_config.json"
JSON_LIMIT = 64 * 2**20  # bytes


@dataclass(frozen=True)
class PeftFolder:
    """What a PEFT folder says.

    method: name in METHODS. modules: module path -> kind -> tensor (a_RI, b_OR, perhaps a vector), float32, s folded
    into b (and into c). rows: module path -> rows of tokens. scales: module path -> s. settings: the config's entries
    that say how it was made; vocabulary: those that tell of embedding and head. base_name: base_model_name_or_path.
    """

    method: str
    modules: dict[str, dict[str, Tensor]]
    rows: dict[str, Tensor]
    scales: dict[str, float]
    settings: dict[str, Any]
    vocabulary: dict[str, Any]
    base_name: str | None


def read_peft(folder: Path, faults: list[str]) -> PeftFolder | None:
    """Read a PEFT folder. Every fault found is appended to `faults`; with faults the answer is None."""
    before = len(faults)
    config = _read_config(folder, faults)
    stored, vocabulary = read_modules(folder, faults)
    if config is None:
        return None
    method = _method(config, stored, faults)
    told = vocabulary.settings(config, faults)
    if vocabulary.embeddings and method != "lora":
        faults.append(f"{vocabulary.embeddings[0]}: an embedding with more than plain LoRA ({method}) is not read")
    stored, experts = unwrapped(config, stored, faults)
    rows = {module: len(held["a"]) for module, held in stored.items()}
    scales = peft_config.scales(config, rows, faults, experts)
    modules = {module: _folded(held, scales.get(module, 1.0)) for module, held in stored.items()}
    lost = [m for m in stored if any(finite(stored[m][kind]) and not finite(modules[m][kind]) for kind in stored[m])]
    add_fault(faults, "values overflow once the scale is folded in", lost)
    gone = [module for module in stored if stored[module]["b"].any() and not modules[module]["b"].any()]
    add_fault(faults, "values vanish once the scale is folded in", gone)
    if len(faults) > before:
        return None
    for parameter, rank in peft_config.told_ranks(config, sorted(experts)).items():
        each = apart(parameter, modules.pop(parameter), rank)
        modules |= each
        scales |= dict.fromkeys(each, scales.pop(parameter))
    settings = {key: config[key] for key in peft_config.RECORDED if key in config}
    base_name = config.get("base_model_name_or_path")
    return PeftFolder(method, modules, vocabulary.rows, scales, settings, told, base_name)


def _folded(held: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """With the scale in what it multiplies: b, and a bias c beside it."""
    return {kind: tensor * scale if kind in "bc" else tensor for kind, tensor in held.items()}


def _method(config: Mapping[str, Any], stored: Mapping[str, Mapping[str, Tensor]], faults: list[str]) -> str:
    """What the tensors are of; a fault where the config tells another."""
    found = {kind for held in stored.values() for kind in held if kind in VECTORS.values()}
    told = {kind for kind, key in peft_config.VECTOR_KEYS.items() if peft_config.is_on(config, key)}
    names = {kind: name for name, kind in VECTORS.items()}
    for kind in sorted(found ^ told) if stored else ():
        has = f"{WEIGHTS} has {'its' if kind in found else 'no'} {names[kind]}"
        faults.append(
            f"{peft_config.VECTOR_KEYS[kind]}: got {config.get(peft_config.VECTOR_KEYS[kind])!r:.80}, but {has}"
        )
    known = {"".join(method_class(name).kinds[2:]): name for name in METHODS}
    method = known.get("".join(sorted(found)))
    if method is None:
        faults.append(f"{' and '.join(peft_config.VECTOR_KEYS[kind] for kind in sorted(found))} together are not read")
    return method or "lora"


def write_peft(
    modules: Mapping[str, Mapping[str, Tensor]],
    base_name: str | None,
    transposed: bool = False,
    embeddings: Collection[str] = (),
    rows: Mapping[str, tuple[list[int], Tensor]] | None = None,
) -> dict[str, bytes]:
    """The files of a PEFT folder, name -> bytes: equal tensors (module path -> kind -> tensor) give equal bytes,
    whatever their order. Raises ValueError where a layer lacks the factors of some of its experts.

    embeddings: which modules are. rows: module path -> token ids, and their rows.
    """
    names = {kind: name for name, kind in KINDS.items()}
    modules = together(modules)
    experts = wrapped([module for module, held in modules.items() if held["a"].dim() == 3])
    tensors = {
        keys_of(experts.get(module, module), names, module in embeddings)[kind]: tensor
        for module, held in sorted(modules.items())
        for kind, tensor in (joined(held) if module in experts else held).items()
    }
    tensors |= {row_key(module): tensor for module, (_, tensor) in sorted((rows or {}).items())}
    vectors = {kind for held in modules.values() for kind in held if kind in VECTORS.values()}
    ranks = {module: held["a"].shape[-2] for module, held in modules.items()}
    config = peft_config.written(ranks, base_name, vectors, transposed, sorted(experts))
    if rows:
        config[ROWS] = {module: ids for module, (ids, _) in rows.items()}
    return {
        WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def _read_config(folder: Path, faults: list[str]) -> dict[str, Any] | None:
    try:
        return parse_object(read_whole(folder / CONFIG, JSON_LIMIT), CONFIG)
    except Unreadable as error:
        faults.append(str(error))
        return None
