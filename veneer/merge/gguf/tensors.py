"""Tensors of transformers under the names, in the order of rows and in the types that llama.cpp reads.

Legend: I in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ModelError
from veneer.merge.gguf.family import Family, rotary_factors

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Names:
    """Names of tensors in the GGUF of one model, by their names in transformers."""

    def __init__(self, config: Any, family: Family) -> None:
        from gguf import MODEL_ARCH, get_tensor_name_map

        arch = next(arch for arch in MODEL_ARCH if arch.name == family.arch.upper())
        self._map = get_tensor_name_map(arch, config.num_hidden_layers)
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        self._interleaved = family.interleaved

    def of(self, tensor: str) -> str | None:
        """`blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`; None for what llama.cpp has not."""
        found: str | None = self._map.get_name(tensor, try_suffixes=(".weight", ".bias"))
        return found

    def ordered(self, module: str, rows_O: Tensor) -> Tensor:
        """What has a row for every output of the module, its rows in llama.cpp's order."""
        heads = self._heads.get(module.rpartition(".")[2]) if self._interleaved else None
        return rows_O if heads is None else interleaved(rows_O, heads)


def interleaved(rows_O: Tensor, heads: int) -> Tensor:
    """Of each head's rows the first half and the second, one from each in turn: what transformers rotates with each
    other comes to stand side by side."""
    return rows_O.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows_O.shape)


def tensors_of(model: Any, family: Family) -> dict[str, Tensor]:
    """Name in GGUF -> tensor of a dense model. Raises ModelError with every tensor that has no place there."""
    names, config = Names(model.config, family), model.config
    state: Mapping[str, Tensor] = model.state_dict()
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    homeless = [name for name in state if names.of(name) is None]
    if homeless:
        more = f" and {len(homeless) - 5} more" if len(homeless) > 5 else ""
        raise ModelError(f"llama.cpp's {family.arch} has no place for {', '.join(homeless[:5])}{more}")
    found = {str(names.of(name)): names.ordered(name.rpartition(".")[0], tensor) for name, tensor in state.items()}
    factors = rotary_factors(config)
    return found if factors is None else {**found, "rope_freqs.weight": factors}


def add_tensor(writer: Any, name: str, tensor: Tensor) -> None:
    """Writes a matrix in its own type, and a vector, which llama.cpp wants so, in float32."""
    from gguf import GGMLQuantizationType

    held = (tensor if tensor.dim() > 1 else tensor.float()).detach().cpu().contiguous()
    if held.dtype == torch.bfloat16:  # numpy has none: its bytes
        writer.add_tensor(name, held.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, held.numpy())
