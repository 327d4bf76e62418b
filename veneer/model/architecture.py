"""The settings of a model's config that change what it computes, in one spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Settings that change what a decoder computes. A list of those that count, not of those that do not: every release
# of transformers adds keys to configs, and an adapter must not become unusable by an upgrade.
_SETTINGS = {
    "sizes": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim embedding_size word_embed_proj_dim type_vocab_size",
    "parts": "hidden_act hidden_activation activation_function rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps "
    "tie_word_embeddings attention_bias mlp_bias use_bias bias qkv_bias do_layer_norm_before use_qk_norm qk_layernorm",
    "attention": "sliding_window layer_types attention_chunk_size attn_logit_softcapping final_logit_softcapping "
    "query_pre_attn_scalar attention_multiplier clip_qkv scale_attn_weights scale_attn_by_inverse_layer_idx alibi "
    "multi_query parallel_attn use_parallel_residual new_decoder_architecture kv_lora_rank q_lora_rank v_head_dim "
    "qk_rope_head_dim qk_nope_head_dim attn_temperature_tuning no_rope_layers position_embedding_type",
    "multipliers": "embedding_multiplier residual_multiplier logits_scaling logit_scale scale_embedding",
    "rotary embedding": "rope_interleaved rotary_dim",  # the rest: `_rope`
    "experts": "num_experts num_local_experts n_routed_experts n_shared_experts num_experts_per_tok norm_topk_prob "
    "moe_intermediate_size shared_expert_intermediate_size routed_scaling_factor scoring_func topk_method topk_group "
    "n_group first_k_dense_replace decoder_sparse_step mlp_only_layers moe_layer_freq interleave_moe_layer_step",
    "state space": "state_size conv_kernel time_step_rank n_groups chunk_size expand ssm_cfg attn_layer_indices "
    "layers_block_type",
}


def settings_of(config: Any) -> dict[str, Any]:
    """The settings that count, as JSON; those that are left out and those that spell out their default are equal.

    Read as attributes, so that a family's own spelling (GPT-2's n_embd) is found under the common one (hidden_size).
    """
    names = ["model_type", *" ".join(_SETTINGS.values()).split()]
    found = {name: _plain(getattr(config, name, None)) for name in names}
    found["rope_parameters"] = _rope(config)
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    if isinstance(heads, int) and isinstance(hidden, int):
        found["num_key_value_heads"] = found["num_key_value_heads"] or heads
        found["head_dim"] = found["head_dim"] or hidden // heads
    if set(found["layer_types"] or ()) == {"full_attention"}:
        found["layer_types"] = None
    for name in ("text_config", "vision_config", "audio_config"):
        if getattr(config, name, None) is not None:
            found[name] = settings_of(getattr(config, name))
    return {name: value for name, value in found.items() if value is not None}


def _rope(config: Any) -> Any:
    """Rotary settings in transformers 5's spelling, from 5's or 4's."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if any(isinstance(value, Mapping) for value in rope.values()):  # one set per kind of layer
        return _plain(rope)
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    for name in ("rope_theta", "partial_rotary_factor", "rotary_pct"):
        if rope.get(name) is None:
            rope[name] = getattr(config, name, None)
    if rope["rope_type"] != "default":  # only a stretched embedding looks at the length
        rope.setdefault("length", getattr(config, "max_position_embeddings", None))
    return _plain(rope)


def _plain(value: Any) -> Any:
    """JSON whose numbers do not depend on storage: GGUF keeps 1e-5 as the float32 9.999999747378752e-06."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)):
        return int(value) if float(value).is_integer() else f"{value:.6g}"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items()) if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)
