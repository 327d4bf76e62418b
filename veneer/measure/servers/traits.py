"""What of a PEFT folder a server may stumble over: trait -> where it is seen, from the config and the tensors' names.

As a server sees the folder: nothing is computed, and what veneer itself would refuse is a trait like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapter.files import Unreadable, parse_object, read_whole
from veneer.adapter.formats import CONFIG, JSON_LIMIT
from veneer.adapter.peft_tensors import WEIGHTS
from veneer.adapter.peft_vocabulary import PREFIX
from veneer.errors import AdapterError
from veneer.model.shards import Shards

# Trait -> what to do about it, whichever the server.
ADVICE = {
    "rank": "veneer convert {adapter} OUT --to peft --rank {limit}",
    "ranks": "train with one rank for all layers, or veneer merge {adapter} --into-base --output MODEL and serve that",
    "alphas": "veneer convert {adapter} OUT --to peft (the scale is folded into the factors)",
    "rslora": "veneer convert {adapter} OUT --to peft (the scale is folded into the factors)",
    "unnamed": "veneer convert {adapter} OUT --to peft (writes them)",
    "target_text": "veneer convert {adapter} OUT --to peft (names every layer)",
    "start": "save it with PEFT's path_initial_model_for_weight_conversion",
    "dora": "veneer merge {adapter} --into-base --output MODEL and serve that, or train with --method lora",
    "lora_bias": "train it without biases",
    "bias": "train it without biases",
    "saved_modules": "train rows with trainable_token_indices, or target embed_tokens and lm_head, in their place",
    "rows": "veneer merge {adapter} --into-base --output MODEL and serve that",
    "embedding": "leave embed_tokens out of target_modules, or merge the adapter into its base",
    "head": "leave lm_head out of target_modules, or merge the adapter into its base",
    "tied_head": "leave lm_head out of target_modules, or merge the adapter into its base",
    "copies": "veneer convert {adapter} OUT --to peft (leaves copies of the base out)",
    "experts": "veneer merge {adapter} --into-base --output MODEL and serve that",
    "unknown_layers": "leave these layers out of target_modules, or merge the adapter into its base",
    "added_tokens": "veneer merge {adapter} --into-base --output MODEL and serve that",
    "pickle": "save it as adapter_model.safetensors",
    "not_lora": "PEFT's convert_to_lora turns many other kinds into LoRA",
    "variant": "train it as plain LoRA",
}
_VARIANTS = ("velora_config", "monteclora_config", "kasa_config", "arrow_config")
_NOT_PLAIN = {"alora": "alora_invocation_tokens", "replication": "layer_replication"}
_NOT_PLAIN |= {"blocks": "use_bdlora", "qalora": "use_qalora"}
_ON = {"rslora": "use_rslora", "lora_bias": "lora_bias", **_NOT_PLAIN}  # trait -> the key that switches it on
ADVICE |= dict.fromkeys(_NOT_PLAIN, ADVICE["variant"])


@dataclass(frozen=True)
class PeftFiles:
    """A folder's config, the shapes of its tensors by name, and the names of its other files."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    names: frozenset[str] = frozenset()

    @classmethod
    def read(cls, folder: str) -> PeftFiles:
        """Raises AdapterError or ModelError where a file is missing or damaged."""
        place = Path(folder)
        try:
            config = parse_object(read_whole(place / CONFIG, JSON_LIMIT), CONFIG)
        except Unreadable as error:
            raise AdapterError(f"{folder} is no PEFT folder: {error}") from error
        return cls(config, Shards([place / WEIGHTS]).shape_of, frozenset(file.name for file in place.iterdir()))

    def ranks(self) -> dict[str, int]:
        """Module path -> rank, of every lora_A; of experts, of all of them together."""
        ends = (".lora_A.weight", ".lora_embedding_A")
        return {
            name.removesuffix(end).removeprefix(PREFIX): shape[0]
            for name, shape in self.shapes.items()
            for end in ends
            if name.endswith(end) and shape
        }


def traits(files: PeftFiles, start_ok: tuple[str, ...] = (), tied: bool | None = None) -> dict[str, str]:
    """Trait -> where it is seen. start_ok: starts that leave the base as it is. tied: whether the base's head is its
    embedding, None where nobody knows."""
    return dict([*_of_config(files.config, start_ok), *_of_tensors(files, tied)])


def _of_config(config: Mapping[str, Any], start_ok: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    missing = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if missing:
        yield "unnamed", f"{CONFIG} lacks {', '.join(missing)}"
    if config.get("peft_type") != "LORA":
        yield "not_lora", f"peft_type is {config.get('peft_type')!r:.40}"
    if isinstance(target := config.get("target_modules"), str) and target not in ("all", "all-linear"):
        yield "target_text", f"target_modules is the pattern {target!r:.80}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in start_ok:
        yield "start", f"init_lora_weights is {start!r:.40}"
    if saved := [name for name in _list(config.get("modules_to_save")) if name not in ("classifier", "score")]:
        yield "saved_modules", f"modules_to_save has {', '.join(f'{name!s:.40}' for name in saved[:4])}"
    if config.get("bias") not in ("none", None):
        yield "bias", f"bias is {config['bias']!r:.40}"
    if variants := [key for key in _VARIANTS if config.get(key)]:
        yield "variant", ", ".join(variants)
    yield from _patterns(config)
    yield from ((trait, key) for trait, key in _ON.items() if config.get(key))


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for trait, pattern, usual in (("ranks", "rank_pattern", "r"), ("alphas", "alpha_pattern", "lora_alpha")):
        if others := _others(config, pattern, usual):
            yield trait, f"{pattern} has {', '.join(others)} beside {usual} {config.get(usual)!r:.20}"


def _of_tensors(files: PeftFiles, tied: bool | None) -> Iterator[tuple[str, str]]:
    names = files.shapes
    if files.config.get("use_dora") or any(name.endswith("lora_magnitude_vector") for name in names):
        yield "dora", "use_dora" if files.config.get("use_dora") else "lora_magnitude_vector"
    for trait, part in (("rows", ".token_adapter."), ("embedding", ".lora_embedding_A"), ("head", "lm_head.lora_A")):
        if found := next((name for name in names if part in name), None):
            yield trait, found
            if trait == "head" and tied:
                yield "tied_head", found
    ends = ("embed_tokens.weight", "lm_head.weight")
    if found := next((name for name in names if name.endswith(ends)), None):
        yield "copies", found
    if found := next((n for n in names if ".experts.lora_A" in n or ".experts.base_layer." in n), None):
        yield "experts", found
    if "added_tokens.json" in files.names:
        yield "added_tokens", "added_tokens.json"


def _others(config: Mapping[str, Any], pattern: str, usual: str) -> list[str]:
    """Values of a pattern that are not the usual one."""
    told = config.get(pattern)
    values = (
        {str(value)[:20] for value in told.values() if value != config.get(usual)} if isinstance(told, dict) else ()
    )
    return sorted(values)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []
