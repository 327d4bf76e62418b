"""SGLang 0.5.23: `LoRAConfig` and `LoRAManager.validate_new_adapter`; patterns as in its source of autumn 2026.

Its scale is lora_alpha / r for all layers: releases before the check of patterns computed another one without a word.
The layers are those whose sizes it knows for every model; a model's own class may add some.
"""

from veneer.measure.servers.server import Server

SGLANG = Server(
    name="SGLang",
    version="0.5.23",
    refused={
        "unnamed": "SGLang needs r, lora_alpha and target_modules",
        "not_lora": "SGLang serves LoRA only",
        "target_text": "SGLang takes no text but 'all' and 'all-linear'",
        "dora": "SGLang does not serve DoRA",
        "ranks": "SGLang knows one rank for all layers",
        "alphas": "SGLang knows one scale for all layers",
        "added_tokens": "SGLang takes no adapters that add tokens",
        "lora_bias": "SGLang serves no LoRA with biases",
        "bias": "SGLang serves no adapter with biases",
        "saved_modules": "SGLang takes no whole copies of modules",
        "rows": "SGLang does not know trained rows of tokens",
    },
    wrong={
        "rslora": "SGLang computes lora_alpha / r",
        "start": "SGLang adds it to a base that this start has changed",
        "alora": "SGLang applies it to every token",
        "replication": "SGLang does not repeat layers",
        "blocks": "SGLang serves plain B·A",
        "qalora": "SGLang serves plain B·A",
        "variant": "SGLang ignores it and serves plain B·A",
    },
    told={
        "experts": "experts in one tensor are served for some model families only",
        "unknown_layers": "served for those model families only whose SGLang class gives their sizes",
    },
    flag="--max-lora-rank",
    layers=(
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
        *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "in_proj", "embed_tokens", "lm_head"),
    ),
)
