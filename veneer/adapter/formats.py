"""PEFT folders, in and out.

Legend: R rank, I in, O out. On disk: adapter_config.json, and adapter_model.safetensors with, for each module,
`base_model.model.<module>.lora_A.weight` (R, I) and `.lora_B.weight` (O, R). The update is s · B A. Inside veneer s is
folded into B, once, here; written out, alpha = r, so that s = 1. DoRA has `.lora_magnitude_vector` (O) as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from veneer.adapter import peft_config
from veneer.adapter.faults import add_fault, finite
from veneer.adapter.files import Unreadable, parse_object, read_whole
from veneer.adapter.peft_tensors import KINDS, PREFIX, WEIGHTS, read_modules

CONFIG = "adapter_config.json"
JSON_LIMIT = 64 * 2**20  # bytes


@dataclass(frozen=True)
class PeftFolder:
    """What a PEFT folder says.

    method: name in METHODS. modules: module path -> kind -> tensor (a_RI, b_OR, for DoRA m_O), float32, s folded into
    b. scales: module path -> s. settings: the config's entries that say how it was made. base_name:
    base_model_name_or_path.
    """

    method: str
    modules: dict[str, dict[str, Tensor]]
    scales: dict[str, float]
    settings: dict[str, Any]
    base_name: str | None


def read_peft(folder: Path, faults: list[str]) -> PeftFolder | None:
    """Read a PEFT folder. Every fault found is appended to `faults`; with faults the answer is None."""
    before = len(faults)
    config = _read_config(folder, faults)
    stored = read_modules(folder, faults)
    if config is None:
        return None
    method = _method(config, stored, faults)
    scales = peft_config.scales(config, {module: len(held["a"]) for module, held in stored.items()}, faults)
    modules = {module: {**held, "b": held["b"] * scales.get(module, 1.0)} for module, held in stored.items()}
    lost = [module for module in stored if finite(stored[module]["b"]) and not finite(modules[module]["b"])]
    add_fault(faults, "values overflow once the scale is folded in", lost)
    if len(faults) > before:
        return None
    settings = {key: config[key] for key in peft_config.RECORDED if key in config}
    return PeftFolder(method, modules, scales, settings, config.get("base_model_name_or_path"))


def _method(config: Mapping[str, Any], stored: Mapping[str, Mapping[str, Tensor]], faults: list[str]) -> str:
    """What the tensors are of; a fault where the config tells another."""
    found = any("m" in held for held in stored.values())
    told = config.get("use_dora")
    if told not in (True, False, None):
        faults.append(f"use_dora: got {told!r:.80}, wanted true or false")
    elif stored and bool(told) != found:
        has = "has magnitudes" if found else "has no magnitudes (lora_magnitude_vector)"
        faults.append(f"use_dora: got {told!r}, but {WEIGHTS} {has}")
    return "dora" if found else "lora"


def write_peft(modules: Mapping[str, Mapping[str, Tensor]], base_name: str | None) -> dict[str, bytes]:
    """The files of a PEFT folder, name -> bytes: equal tensors (module path -> kind -> tensor) give equal bytes,
    whatever their order."""
    keys = {kind: name for name, kind in KINDS.items()}
    tensors = {
        f"{PREFIX}{module}.{keys[kind]}": tensor
        for module, held in sorted(modules.items())
        for kind, tensor in held.items()
    }
    is_dora = any("m" in held for held in modules.values())
    config = peft_config.written({module: len(held["a"]) for module, held in modules.items()}, base_name, is_dora)
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
