"""Checkpoints that come quantised: bitsandbytes' 4-bit NF4 is read and written as it is, other formats are named.

In the files a packed layer is `weight` (bytes), `weight.absmax`, `weight.quant_map`, with double quantisation
`weight.nested_absmax` and `weight.nested_quant_map`, and a JSON under `weight.quant_state.bitsandbytes__nf4`.
bitsandbytes itself is not needed.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.bases.base import Base
from veneer.errors import ModelError, listed
from veneer.model.shards import Shards
from veneer.notes import tell

NF4 = {False: "nf4", True: "nf4-dq"}  # with double quantisation? -> name of the storage
STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


def stored_as(name: str, quantization: Any) -> str | None:
    """The storage that a config.json's `quantization_config` stands for; None for a dense checkpoint.

    Raises ModelError that names a format which is not read.
    """
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping) and not hasattr(quantization, "to_dict"):
        raise ModelError(
            f"quantization_config in the config.json of {name} is {quantization!r}; wanted an object. "
            "Next: download the checkpoint again, or name the original model"
        )
    facts = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    kind = _format(facts)
    if kind == "bitsandbytes nf4":
        return NF4[bool(facts.get("bnb_4bit_use_double_quant"))]
    raise ModelError(
        f"{name} is quantised as {kind}; read are dense checkpoints and bitsandbytes 4-bit nf4. "
        "Next: name the original model as the base, and quantise it while loading (--load-in-4bit, --load-in-8bit)"
    )


def agree(name: str, stored: str, asked: str) -> str:
    """The storage of a checkpoint that is packed already; raises ModelError where another was asked for, and warns
    where it differs in double quantisation alone."""
    if asked != "dense" and asked not in NF4.values():
        raise ModelError(
            f"{name} is stored as {stored} and loads as that; {asked} was asked for. "
            "Next: leave the storage option out, or name the original model as the base"
        )
    if asked not in ("dense", stored):
        tell(f"{name} is stored as {stored} and loads as that, not as {asked}")
    return stored


def check_packed(name: str, weights: Iterable[str], names: Container[str]) -> None:
    """Raises ModelError where a checkpoint that says it is packed holds no packed layer."""
    if not any(is_packed(weight, names) for weight in weights):
        raise ModelError(
            f"the config.json of {name} says that it is quantised (bitsandbytes nf4), and its files hold no packed "
            "layer. Next: download the checkpoint again, or remove quantization_config from its config.json"
        )


def is_packed(weight: str, names: Container[str]) -> bool:
    """Whether the layer of this weight's name is stored in NF4."""
    return f"{weight}.{STATE}" in names


def storage_of(weight: str, names: Container[str]) -> str:
    """nf4, or nf4-dq where the block scales are quantised too."""
    return NF4[f"{weight}.nested_absmax" in names]


def parts_of(weight: str, names: Container[str]) -> list[str]:
    """The names of all that is stored for a packed layer."""
    return [weight, *(name for part in PARTS if (name := f"{weight}.{part}") in names)]


def read(weight: str, shards: Shards, kind: type[Base], shape: tuple[int, int], bias: Tensor | None, **to: Any) -> Base:
    """The base of a packed layer, `shape` (O, I), byte for byte that of the files. `to`: compute dtype, device."""
    base = kind.empty(*shape, bias is not None, **to)
    layer = weight.removesuffix("weight")
    state = {name.removeprefix(layer): shards.read(name) for name in parts_of(weight, shards.file_of)}
    if bias is not None:
        state["bias"] = bias
    try:
        base.load_state_dict(state)
    except (ModelError, RuntimeError) as error:  # both: a headline, then a line for each fault
        faults = [line.strip(" -") for line in str(error).splitlines()[1:]]
        headline = f"{weight} in {shards.file_of[weight]} is not the NF4 weight of a layer {shape}:"
        raise ModelError(listed(headline, faults or [str(error)], "Next: download the checkpoint again.")) from error
    return base


def quantization_config(storage: str, dtype: torch.dtype, kept_dense: list[str]) -> dict[str, Any]:
    """What config.json says so that transformers with bitsandbytes reads the layout. kept_dense: linear layers."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": storage == NF4[True],
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept_dense,
    }


def _format(facts: Mapping[str, Any]) -> str:
    method = str(facts.get("quant_method") or "")
    if facts.get("load_in_4bit"):
        return f"bitsandbytes {facts.get('bnb_4bit_quant_type', 'fp4')}"
    if facts.get("load_in_8bit"):
        return "bitsandbytes int8"
    return {"gptq": "GPTQ", "awq": "AWQ"}.get(method, method or "an unnamed format")
