"""Families of models for the tests: pico configs of those that need a word of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

# initializer_range 0.3 instead of 0.02: with the usual one the attention of so small a model is uniform, and a wrong
# scale or a lost rotation would go unseen.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def config_of(family: str, **more: Any) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **more})


def gpt2() -> Any:
    return AutoConfig.for_model(
        "gpt2", vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )


def gemma3() -> Any:
    text = {**SIZES, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}
    tokens = {"image_token_index": 58, "boi_token_index": 59, "eoi_token_index": 60, "mm_tokens_per_image": 4}
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION, **tokens)


def llava() -> Any:
    parts = {
        "text_config": {**SIZES, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
    }
    return AutoConfig.for_model("llava", **parts, image_token_index=58)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    tokens = {"image_token_id": 57, "video_token_id": 58, "vision_start_token_id": 59, "vision_end_token_id": 60}
    return AutoConfig.for_model(
        "qwen2_vl", text_config={**SIZES, "rope_parameters": rope}, vision_config=vision, **tokens
    )


def model_of(config: Any) -> nn.Module:
    """A random model of the family, as `from_pretrained` would choose its class."""
    kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    capped = getattr(config, "attn_logit_softcapping", None)  # which sdpa leaves out in transformers 5.17
    return kind.from_config(config, **{"attn_implementation": "eager"} if capped else {}).to(torch.float32).eval()
