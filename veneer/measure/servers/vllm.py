"""vLLM 0.33: `PEFTHelper`, which validates adapter_config.json, and `LoRAModel`, which reads names.

Unknown keys of the config are ignored, so variants that it does not know load and compute something else.
"""

from veneer.measure.servers.server import Server

VLLM = Server(
    name="vLLM",
    version="0.33",
    refused={
        "unnamed": "vLLM needs r, lora_alpha and target_modules",
        "not_lora": "vLLM serves LoRA only",
        "dora": "vLLM does not serve DoRA",
        "lora_bias": "vLLM serves no LoRA with biases",
        "bias": "vLLM serves no adapter with biases",
        "start": "vLLM refuses starts that move weight out of the base",
        "saved_modules": "vLLM takes no whole copies of modules",
        "rows": "vLLM does not know trained rows of tokens",
        "copies": "vLLM does not understand weights without factors",
        "alora": "vLLM does not serve aLoRA",
        "replication": "vLLM does not repeat layers",
        "blocks": "vLLM does not serve BD-LoRA",
        "qalora": "vLLM does not serve QALoRA",
    },
    wrong={"variant": "vLLM ignores it and serves plain B·A"},
    told={
        "embedding": "served for those model families only whose vLLM class lists embedding modules",
        "head": "served for those model families only whose vLLM class lists embedding modules",
        "experts": 'experts in one tensor: load it with "is_3d_lora_weight": true',
    },
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    started=16,
    flag="--max-lora-rank",
)
