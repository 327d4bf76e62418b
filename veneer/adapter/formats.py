"""PEFT folders, in and out.

Legend: R rank, I in, O out. On disk: adapter_config.json, and adapter_model.safetensors with, for each module,
`base_model.model.<module>.lora_A.weight` (R, I) and `.lora_B.weight` (O, R). The update is s · B A. Inside veneer s is
folded into B, once, here; written out, alpha = r, so that s = 1.
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
from veneer.adapter.peft_tensors import PREFIX, WEIGHTS, read_pairs

CONFIG = "adapter_config.json"
JSON_LIMIT = 64 * 2**20  # bytes


@dataclass(frozen=True)
class PeftFolder:
    """What a PEFT folder says.

    factors: module path -> (a_RI, b_OR), float32, s folded into b. scales: module path -> s.
    settings: the config's entries that say how it was made. base_name: base_model_name_or_path.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    settings: dict[str, Any]
    base_name: str | None


def read_peft(folder: Path, faults: list[str]) -> PeftFolder | None:
    """Read a PEFT folder. Every fault found is appended to `faults`; with faults the answer is None."""
    before = len(faults)
    config = _read_config(folder, faults)
    pairs = read_pairs(folder, faults)
    if config is None:
        return None
    scales = peft_config.scales(config, {module: len(a_RI) for module, (a_RI, _) in pairs.items()}, faults)
    factors = {module: (a_RI, b_OR * scales.get(module, 1.0)) for module, (a_RI, b_OR) in pairs.items()}
    lost = [module for module in pairs if finite(pairs[module][1]) and not finite(factors[module][1])]
    add_fault(faults, "values overflow once the scale is folded in", lost)
    gone = [module for module in pairs if pairs[module][1].any() and not factors[module][1].any()]
    add_fault(faults, "values vanish once the scale is folded in", gone)
    if len(faults) > before:
        return None
    settings = {key: config[key] for key in peft_config.RECORDED if key in config}
    return PeftFolder(factors, scales, settings, config.get("base_model_name_or_path"))


def write_peft(factors: Mapping[str, tuple[Tensor, Tensor]], base_name: str | None) -> dict[str, bytes]:
    """The files of a PEFT folder, name -> bytes: equal factors give equal bytes, whatever their order."""
    tensors = {}
    for module, (a_RI, b_OR) in sorted(factors.items()):
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a_RI
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_OR
    config = peft_config.written({module: len(a_RI) for module, (a_RI, _) in factors.items()}, base_name)
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
