"""llama.cpp of 2026: `convert_lora_to_gguf.py` (commit 0b03ada), and the scale lora_alpha / rank of its runtime.

The converter stops at every tensor that is no factor of a known one, and keeps of the config lora_alpha alone.
"""

from veneer.measure.servers.server import Server

LLAMA_CPP = Server(
    name="llama.cpp",
    version="0b03ada (2026)",
    refused={
        "unnamed": "its converter needs lora_alpha",
        "not_lora": "llama.cpp knows LoRA only",
        "dora": "its converter stops at magnitudes",
        "lora_bias": "its converter stops at biases",
        "bias": "its converter stops at biases",
        "saved_modules": "its converter stops at whole copies of modules",
        "rows": "its converter stops at trained rows of tokens",
        "copies": "its converter stops at weights without factors",
        "experts": "its converter knows no experts in one tensor",
        "tied_head": "the base's head is its embedding, and an adapter of it is refused",
    },
    wrong={
        "rslora": "llama.cpp computes lora_alpha / rank",
        "alphas": "llama.cpp knows one lora_alpha for all layers",
        "start": "llama.cpp adds it to a base that this start has changed",
        "replication": "llama.cpp does not repeat layers",
        "blocks": "llama.cpp serves plain B·A",
        "qalora": "llama.cpp serves plain B·A",
        "variant": "llama.cpp ignores it and serves plain B·A",
    },
    told={"head": "refused where the base's head is its embedding"},
    first="convert it first: veneer convert {adapter} OUT --to gguf",
)
