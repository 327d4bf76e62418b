"""A 4-bit weight in a checkpoint, as bitsandbytes writes it to safetensors.

Below the layer's name: `weight` (codes), `weight.absmax`, `weight.quant_map`, with double quantisation also
`weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4`: what is no tensor,
as JSON in UTF-8 in a uint8 tensor.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from veneer.bases.base import Base
from veneer.kernels.fourbit import BLOCK, LEVELS
from veneer.kernels.nested import NESTED_BLOCK, Nested

STATE = "weight.quant_state.bitsandbytes__nf4"
LEVELS_KEY = "weight.quant_map"
OFFSET = "weight.nested_offset"  # a parameter here, a number in the JSON of a checkpoint


def extra_state(base: Base, nested: Nested | None) -> dict[str, Tensor]:
    """What goes with codes and magnitudes: the levels, and the settings as JSON."""
    settings: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(base.dtype).removeprefix("torch."),
        "shape": [base.out_features, base.in_features],
    }
    if nested is not None:
        offset = 0.0 if nested.offset.is_meta else nested.offset.item()
        settings |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    return {LEVELS_KEY: torch.tensor(LEVELS["nf4"], device=base.device), STATE: text.to(base.device)}


def faults_of(state: dict[str, Tensor], base: Base, nested: bool) -> list[str]:
    """What keeps `state` from being this base's weight, one line each.

    Brings it into the form of the base's own: codes that were stored as another dtype (`bnb_4bit_quant_storage`) or
    lying flat become uint8 (P, 1), and the mean of the magnitudes comes out of the JSON.
    """
    state["weight"] = _codes(state["weight"], base.weight)
    if STATE not in state:
        others = [key for key in state if key.startswith("weight.quant_state.")]
        return [f"{STATE}: got {', '.join(others) or 'nothing'}; wanted a weight that bitsandbytes stored as nf4"]
    settings = _settings(state[STATE])
    if settings is None:
        return [f"{STATE}: not a JSON object; wanted the settings as UTF-8 in a uint8 tensor"]
    faults = _setting_faults(settings, base, nested)
    if nested and not faults:
        state[OFFSET] = torch.tensor([settings["nested_offset"]], device=state["weight"].device)
    levels = state.get(LEVELS_KEY)
    if levels is not None and not _same_levels(levels):
        faults.append(f"{LEVELS_KEY}: not the 16 levels of NF4")
    return faults


def _setting_faults(settings: dict[str, Any], base: Base, nested: bool) -> list[str]:
    wanted = {"quant_type": "nf4", "blocksize": BLOCK, "shape": [base.out_features, base.in_features]}
    doubled = "nested_offset" in settings
    if doubled and nested:
        wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    faults = [
        f"{STATE}: {name} {settings.get(name)}, wanted {value}"
        for name, value in wanted.items()
        if settings.get(name) != value
    ]
    if doubled and not nested:
        faults.append(f"{STATE}: double quantisation, which is the storage nf4-dq")
    elif nested and not doubled:
        faults.append(f"{STATE}: no double quantisation, which is the storage nf4")
    elif nested and not _finite(settings["nested_offset"]):
        faults.append(f"{STATE}: nested_offset {settings['nested_offset']}, wanted a finite number")
    return faults


def _finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number)


def _codes(stored: Tensor, held: Tensor) -> Tensor:
    if stored.nbytes != held.nbytes or not stored.is_contiguous():
        return stored
    return stored.view(-1).view(torch.uint8).view(held.shape)


def _settings(text: Tensor) -> dict[str, Any] | None:
    try:
        settings = json.loads(bytes(text.tolist()).decode())
    except (ValueError, TypeError):
        return None
    return settings if isinstance(settings, dict) else None


def _same_levels(levels: Tensor) -> bool:
    wanted = torch.tensor(LEVELS["nf4"])
    return levels.is_meta or (levels.shape == wanted.shape and torch.allclose(levels.cpu().float(), wanted, atol=1e-6))
