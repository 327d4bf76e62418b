"""Which families of models have a form in llama.cpp that is known here, and what it wants to know of one.

A family that is not in the table, or a setting that llama.cpp would not compute, is refused by name: read back there it
would give text, and a wrong one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ModelError, listed

FILE = "model.gguf"


@dataclasses.dataclass(frozen=True)
class Family:
    """arch: llama.cpp's name of it. interleaved: whether it rotates neighbours of q and k (0 with 1, 2 with 3 ...),
    where transformers rotates the halves of a head. factors: whether it reads a factor for each frequency. biases:
    settings of transformers for biases that it does not compute."""

    arch: str
    interleaved: bool = False
    factors: bool = False
    biases: tuple[str, ...] = ()


# transformers' model_type -> what it is in llama.cpp
FAMILIES = {
    "llama": Family("llama", interleaved=True, factors=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", biases=("attention_bias",)),
}
_FACTORS = ("llama3", "linear")  # scalings of the rotation that are one factor a frequency, whatever the length


def family_of(config: Any) -> Family:
    """The family of transformers' config. Raises ModelError with everything that llama.cpp would compute otherwise."""
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"GGUF of the family {config.model_type}: known are {', '.join(FAMILIES)}. Next: merge into a folder "
            "(without --format gguf), and give that to llama.cpp's convert_hf_to_gguf.py"
        )
    if faults := _faults(config, found):
        raise ModelError(listed(f"this {config.model_type} has no GGUF that computes the same:", faults))
    return found


def _faults(config: Any, family: Family) -> list[str]:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    faults = [f"{name}: llama.cpp's {family.arch} has none there" for name in family.biases if getattr(config, name)]
    if config.hidden_act != "silu":
        faults.append(f"hidden_act: got {config.hidden_act}, wanted silu")
    if any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or ()):
        faults.append("use_sliding_window: wanted full attention in every layer")
    if rope.get("partial_rotary_factor", 1) != 1:
        faults.append(f"partial_rotary_factor: got {rope['partial_rotary_factor']}, wanted 1")
    if kind != "default" and not (family.factors and kind in _FACTORS):
        wanted = " or ".join(("default", *(_FACTORS if family.factors else ())))
        faults.append(f"rope_type: got {kind}, wanted {wanted}")
    return faults


def head_size(config: Any) -> int:
    """Numbers in one head of attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def describe(writer: Any, config: Any) -> None:
    """Writes the sizes of a model to a gguf.GGUFWriter."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def rotary_factors(config: Any) -> Tensor | None:
    """By how much each frequency of the rotation is divided (head size / 2); None where none is."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    exponents = torch.arange(0, head_size(config), 2, dtype=torch.float32) / head_size(config)
    return config.rope_parameters["rope_theta"] ** -exponents / scaled
