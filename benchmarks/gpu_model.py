"""A Llama of a given shape with random weights, made on the device one module at a time; the work both sides get.

Ours, PEFT and the checkpoint that Unsloth loads have the same weights: each comes from a generator of its own, seeded
by the module's place in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_spec import Spec, sizes

PAD, BEGIN, END = 0, 1, 2
MOST_TOKENS = 40000  # ids are drawn below this
STD = 0.02
Each = Callable[[nn.Module, str], None]


def config_of(shape: str, sequence: int = 4096) -> Any:
    """The configuration of a shape, long enough for `sequence`."""
    from transformers import LlamaConfig

    tokens = {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
    return LlamaConfig(max_position_embeddings=max(32768, sequence), use_cache=False, **tokens, **sizes(shape))


def fresh(
    shape: str, device: str, dtype: torch.dtype = torch.bfloat16, each: Each | None = None, sequence: int = 4096
) -> Any:
    """The model. `each(model, path)` is called when a linear layer of a decoder layer was made, before the next is:
    a storage that packs it there keeps the peak near the packed size."""
    from transformers import AutoModelForCausalLM

    config = config_of(shape, sequence)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    head = model.get_output_embeddings()
    # Paths, not modules: one that was replaced by a packed layer must not be held until the last is made.
    for seed, path in enumerate([path for path, _ in model.named_modules()]):
        module = model.get_submodule(path)
        if module is head and config.tie_word_embeddings:
            head.weight = model.get_input_embeddings().weight
            continue
        _make(model, path, module, device, seed)
        if each is not None and isinstance(module, nn.Linear) and module is not head:
            each(model, path)
    model.train()
    return model


def _make(model: nn.Module, path: str, module: nn.Module, device: str, seed: int) -> None:
    """Gives one module's own tensors storage and values."""
    if type(module).__name__.endswith("RotaryEmbedding"):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, type(module)(config=model.config).to(device))
        return
    if not list(module.parameters(recurse=False)):
        return
    module.to_empty(device=device, recurse=False)
    generator = torch.Generator(device=device).manual_seed(seed)
    for parameter in module.parameters(recurse=False):
        if isinstance(module, nn.Linear | nn.Embedding):
            parameter.data.normal_(0.0, STD, generator=generator)
        else:
            parameter.data.fill_(1.0)


def batch_of(spec: Spec, step: int) -> Tensor:
    """Token ids (batch, sequence) of a step, on the CPU. Small ones are likelier: there is something to learn."""
    generator = torch.Generator().manual_seed(1 + step)
    most = min(MOST_TOKENS, sizes(spec.shape)["vocab_size"])
    drawn = torch.rand(spec.batch, spec.sequence, generator=generator, dtype=torch.float64)
    return (drawn.pow(3) * (most - 3)).long() + 3
