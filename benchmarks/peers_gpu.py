"""The systems we are measured against on a GPU: PEFT, PEFT with Liger's kernels, QLoRA, Unsloth, full fine-tuning.

Choices made in the peers' favour: token ids come ready made; one plain loop with a fused AdamW and nothing else (no
Trainer, no logging); each has variants of batch, recompute and compiling, of which the driver keeps the best. Adapters
and moments are float32 on both sides; a run records the dtypes that it really had.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers_checkpoint
from benchmarks.gpu_meter import Meter
from benchmarks.gpu_model import batch_of, fresh
from benchmarks.gpu_spec import Spec

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE, CLIP = 1e-4, 1.0


def train(spec: Spec, meter: Meter, device: str = "cuda") -> Sequence[Tensor]:
    """Trains spec.steps steps; returns the optimiser's moments."""
    model, facts = _built(spec, device)
    model.train()
    for parameter in (trained := [p for p in model.parameters() if p.requires_grad]):
        if spec.system != "full-bf16-liger":
            parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    gc.collect()
    meter.ready(trained, **facts)
    for step in range(spec.steps):
        total = torch.zeros((), device=device)
        for ids in batch_of(spec, step).to(device).chunk(spec.passes):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / spec.passes
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step(total)
    return [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]


def _built(spec: Spec, device: str) -> tuple[Any, dict[str, Any]]:
    if "liger" in spec.system:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if "unsloth" in spec.system:
        return _unsloth(spec)
    return (_full if spec.system.startswith("full") else _peft)(spec, device), {"attention": "sdpa"}


def _full(spec: Spec, device: str) -> Any:
    """Every weight is trained: float32 under autocast, or all in bfloat16 (moments too: less memory, less exact)."""
    model = fresh(spec.shape, device, torch.bfloat16 if spec.storage == "bf16" else torch.float32)
    _recompute_and_compile(model, model, spec)
    return model


def _peft(spec: Spec, device: str) -> Any:
    from peft import LoraConfig, get_peft_model

    base = fresh(spec.shape, device, each=_to_nf4 if spec.storage == "nf4" else None, sequence=spec.sequence)
    base.is_loaded_in_4bit = spec.storage == "nf4"
    _recompute_and_compile(base, base, spec)
    settings = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=TARGETS
    )
    return get_peft_model(base, settings)


def _recompute_and_compile(model: Any, base: Any, spec: Spec) -> None:
    if spec.recompute != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if spec.compile:  # in place, layer by layer: what PEFT puts inside later is compiled with it
        for layer in base.model.layers:
            layer.compile(dynamic=False)


def _to_nf4(model: nn.Module, path: str) -> None:
    """bitsandbytes' layer, with double quantisation, where the dense one stood."""
    bnb: Any = importlib.import_module("bitsandbytes")

    parent, _, name = path.rpartition(".")
    dense = model.get_submodule(path)
    device = dense.weight.device
    options = {"quant_type": "nf4", "compress_statistics": True}
    packed = bnb.nn.Linear4bit(
        dense.in_features, dense.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **options
    )
    packed.weight = bnb.nn.Params4bit(dense.weight.data.cpu(), requires_grad=False, module=packed, **options)
    setattr(model.get_submodule(parent), name, packed.to(device))


def _unsloth(spec: Spec) -> tuple[Any, dict[str, Any]]:
    """Loads the saved checkpoint, as its users do; `recompute` unsloth is its own, which offloads layer inputs."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(peers_checkpoint.folder(spec.shape)),
        max_seq_length=spec.sequence,
        dtype=torch.bfloat16,
        load_in_4bit=spec.storage == "nf4",
        load_in_fp8=spec.storage == "fp8",
    )
    recompute: Any = {"none": False, "layers": True}.get(spec.recompute, spec.recompute)
    model = FastLanguageModel.get_peft_model(
        model,
        r=spec.rank,
        target_modules=TARGETS,
        lora_alpha=spec.alpha,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=recompute,
        random_state=0,
    )
    layer = next(module for path, module in model.named_modules() if path.endswith("q_proj"))
    weight = getattr(layer, "base_layer", layer).weight
    return model, {"base_weight": f"{type(weight).__name__} {weight.dtype}", "attention": _unsloth_attention()}


def _unsloth_attention() -> str:
    """The kernel that Unsloth found: FlashAttention, xFormers, or torch's own."""
    from unsloth.models import _utils as found

    if getattr(found, "HAS_FLASH_ATTENTION", False):
        return "flash_attn"
    return "sdpa" if getattr(found, "xformers", None) is None else "xformers"
