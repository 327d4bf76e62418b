"""PEFT 0.21.2: what it reads of a LoRA folder; its own format, so little can be wrong."""

from veneer.measure.servers.server import Server

PEFT = Server(
    name="PEFT",
    version="0.21.2",
    refused={"unnamed": "PEFT has other defaults, and finds other layers or another scale"},
    told={
        "dora": "no batches of several adapters (adapter_names)",
        "not_lora": "another method of PEFT's",
        "embedding": "with tied embeddings PEFT adapts the embedding alone",
    },
)
