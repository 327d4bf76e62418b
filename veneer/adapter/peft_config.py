"""adapter_config.json of a LoRA: what it says, whether it is understood, and how ours is written.

PEFT's rules: s = alpha / r, or alpha / √r with use_rslora; rank_pattern and alpha_pattern change r and alpha by module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from veneer.adapter.faults import SHOWN, add_fault
from veneer.adapter.patterns import TooCostly, exact, resolve
from veneer.errors import nearest

_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # those that leave the base as it is

# Settings that add something to s · B A, with what they add: refused unless empty.
_REFUSED = {
    "modules_to_save": "whole copies of base modules are part of the adapter; PEFT's merge_and_unload() makes a model "
    "of it, whose other linear layers `veneer convert --extract --force` makes an adapter again, without the copies",
    "layer_replication": "layers of the base are repeated",
    "alora_invocation_tokens": "aLoRA acts only after certain tokens",
    "use_qalora": "QALoRA pools the input",
    "velora_config": "VeLoRA is a variant of its own",
    "monteclora_config": "MonteCLoRA samples its factors",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes between adapters token by token",
    "kasa_config": "KaSA changes the base weights",
    "megatron_config": "Megatron's layers are sharded",
}
# Settings that choose targets, concern training only, or say where the adapter came from.
_HARMLESS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "target_modules target_parameters exclude_modules fan_in_fan_out lora_dropout layers_to_transform layers_pattern "
    "megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size "
    "ensure_weight_tying runtime_config trainable_token_indices".split()  # the last: see peft_vocabulary
)
_READ = frozenset(
    "r lora_alpha use_rslora rank_pattern alpha_pattern init_lora_weights bias use_dora lora_bias".split()
)
# kind of a vector beside the factors -> the setting that announces it
VECTOR_KEYS = {"m": "use_dora", "c": "lora_bias", "o": "bias"}
RECORDED = (
    *sorted(_READ - set(VECTOR_KEYS.values())),
    "lora_dropout",
    "fan_in_fan_out",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
)


def written(
    ranks: Mapping[str, int],
    base_name: str | None,
    vectors: Collection[str] = (),
    transposed: bool = False,
    experts: Sequence[str] = (),
) -> dict[str, Any]:
    """adapter_config.json for modules of these ranks, with alpha = r everywhere. vectors: kinds beside the factors.
    transposed: the base's layers are `Conv1D`; their factors are as all others, but PEFT warns where it is not told.
    experts: those of the modules that are parameters of experts.

    Targets are whole paths: an end such as `q_proj` would also adapt the layers that a rank plan left out.
    """
    counts = Counter(ranks.values())
    usual = min(counts, key=lambda rank: (-counts[rank], rank))
    others = {rank: [module for module in ranks if ranks[module] == rank] for rank in sorted(counts) if rank != usual}
    patterns = {exact(modules): rank for rank, modules in others.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
        "use_dora": "m" in vectors,
        "lora_bias": "c" in vectors,
        "lora_dropout": 0.0,
        "bias": "lora_only" if "o" in vectors else "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(ranks.keys() - set(experts)),
        **({"target_parameters": list(experts)} if experts else {}),
    }


def scales(
    config: Mapping[str, Any], ranks: Mapping[str, int], faults: list[str], experts: Collection[str] = ()
) -> dict[str, float]:
    """s of each module of these ranks (read from its tensors). experts: modules with so many ranks for each expert.

    Appended to `faults`: whatever makes the adapter more than s · B A, is out of range or not understood, and every
    module whose rank in the config is not that of its tensors. With such faults the answer may lack modules.
    """
    modules, before = list(ranks), len(faults)
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = "only LORA is read; PEFT's convert_to_lora turns many other kinds into it"
        faults.append(f"peft_type: got {kind!r:.80}; {hint}" if kind else "peft_type: missing, wanted 'LORA'")
        return {}
    faults += [*_variants(config), *_malformed(config), *_strangers(config)]
    told = _resolved(config, "r", "rank_pattern", modules, faults)
    alphas = _resolved(config, "lora_alpha", "alpha_pattern", modules, faults)
    if len(faults) > before:
        return {}
    odd = [m for m in modules if (ranks[m] % told[m] if m in experts else told[m] != ranks[m])]
    wrong = [f"{m} (config {told[m]}, tensors {ranks[m]})" for m in odd]
    add_fault(faults, "the rank is not that of the tensors", wrong)
    root = math.sqrt if config.get("use_rslora") else float
    return {module: alphas[module] / root(told[module]) for module in modules}


def told_ranks(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, int]:
    """r of each module, of a config in which `scales` has found no fault."""
    return _resolved(config, "r", "rank_pattern", modules, [])


def is_on(config: Mapping[str, Any], key: str) -> bool:
    """Whether a setting announces a vector."""
    return config.get(key) == "lora_only" if key == "bias" else config.get(key) is True


def _variants(config: Mapping[str, Any]) -> list[str]:
    """Whatever makes the adapter more than s · B A."""
    faults = [f"{key}: {reason}" for key, reason in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") not in ("none", "lora_only"):
        faults.append(f"bias: got {config['bias']!r:.80}; biases of layers without factors are part of the adapter")
    for key in ("use_dora", "lora_bias"):
        if config.get(key) not in (True, False, None):
            faults.append(f"{key}: got {config[key]!r:.80}, wanted true or false")
    start = config.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _STARTS):
        hint = "this start moves weight out of the base; save with path_initial_model_for_weight_conversion"
        faults.append(f"init_lora_weights: got {start!r:.80}; {hint}")
    return faults


def _malformed(config: Mapping[str, Any]) -> list[str]:
    faults = []
    for key in ("base_model_name_or_path", "target_modules", "exclude_modules"):
        value = config.get(key)
        values = value if isinstance(value, list) and key != "base_model_name_or_path" else [value]
        if value is not None and not all(isinstance(item, str) for item in values):
            faults.append(f"{key}: got {value!r:.80}, wanted text")
    if config.get("use_rslora") not in (True, False, None):
        faults.append(f"use_rslora: got {config['use_rslora']!r:.80}, wanted true or false")
    dropout = config.get("lora_dropout") or 0.0
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        faults.append(f"lora_dropout: got {dropout!r:.80}, wanted a number of at least 0 and below 1")
    return faults


def _strangers(config: Mapping[str, Any]) -> list[str]:
    """Settings we do not know, unless empty: a later PEFT writes its new ones even where they are off."""
    known = _HARMLESS | _READ | _REFUSED.keys()
    strangers = [key for key in config if key not in known and config[key]]
    rest = len(strangers) - SHOWN
    return [_stranger(key, known) for key in strangers[:SHOWN]] + ([f"{rest} more such settings"] if rest > 0 else [])


def _stranger(key: str, known: Iterable[str]) -> str:
    near = nearest(key, known, 1) if len(key) < 40 else []  # difflib takes long over long texts
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key!r:.80}: not a known setting of LoRA, it might change the result{hint}"


def _resolved(
    config: Mapping[str, Any], key: str, pattern_key: str, modules: Sequence[str], faults: list[str]
) -> dict[str, Any]:
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        faults.append(f"{pattern_key}: got {patterns!r:.80}, wanted an object")
        return {}
    wanted, is_good = ("a whole number >= 1", _is_rank) if key == "r" else ("a finite number other than 0", _is_alpha)
    values = {key: config.get(key), **{f"{pattern_key}[{name!r:.80}]": value for name, value in patterns.items()}}
    faults += [f"{name}: got {value!r:.80}, wanted {wanted}" for name, value in values.items() if not is_good(value)]
    try:
        return resolve(patterns, modules, config.get(key))
    except TooCostly as error:
        faults.append(f"{pattern_key}: {error}")
        return {}


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and value != 0 and abs(value) <= torch.finfo(torch.float32).max
