"""What one GPU run is: the shape of the model, the system, and how it trains. Plain values, no torch.

Legend: D hidden size, V vocabulary, S sequence length.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

# Llama shapes. The numbers of 1B, 8B and 70B are those of Llama 3, of 65B those of LLaMA (arXiv 2302.13971).
SHAPES: dict[str, dict[str, Any]] = {
    "pico": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "65b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}


def sizes(shape: str) -> dict[str, Any]:
    """The numbers of a shape; `8b:4` is 8b with 4 layers."""
    name, _, layers = shape.partition(":")
    return SHAPES[name] | ({"num_hidden_layers": int(layers)} if layers else {})


@dataclasses.dataclass(frozen=True)
class Spec:
    """One run of one system, in a process of its own."""

    system: str  # a key of benchmarks.gpu_rows.SYSTEMS
    shape: str
    storage: str = "bf16"  # of the frozen base; of full fine-tuning: of the weights
    rank: int = 16
    sequence: int = 4096
    batch: int = 1  # rows of a step
    passes: int = 1  # that a step's rows are computed in, one after another
    recompute: str = "none"  # none, layers (all), or the system's own: offload, in-backward, a number, unsloth
    compile: bool = False
    steps: int = 8
    cap_gib: float | None = None  # limit of the caching allocator; the CUDA context comes on top
    optim: Any = "adamw"  # of our side, a name of veneer.train.optim; float32 moments unless it says otherwise

    @property
    def alpha(self) -> float:
        return 2.0 * self.rank

    @property
    def variant(self) -> dict[str, Any]:
        """What a scan chooses between."""
        return {"batch": self.batch, "passes": self.passes, "recompute": self.recompute, "compile": self.compile}

    @classmethod
    def parse(cls, text: str) -> Spec:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def but(self, **changes: Any) -> Spec:
        return dataclasses.replace(self, **changes)


def layer_sizes(shape: str) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of one decoder layer."""
    s = sizes(shape)
    width, inner = s["hidden_size"], s["intermediate_size"]
    keys = width // s["num_attention_heads"] * s["num_key_value_heads"]
    return [
        (width, width),
        (keys, width),
        (keys, width),
        (width, width),
        (inner, width),
        (inner, width),
        (width, inner),
    ]


def adapter_parameters(shape: str, rank: int) -> int:
    """Trained numbers of LoRA on all linear layers."""
    return sizes(shape)["num_hidden_layers"] * rank * sum(out + into for out, into in layer_sizes(shape))


def flop_per_token(spec: Spec) -> dict[str, float]:
    """Floating point operations that training one token needs, with nothing computed twice.

    `linear`: the products with layer weights, 2 forward and 2 backward for each weight, 2 more where W has a gradient;
    `rest`: the vocabulary head on every token, the adapter, and causal attention (half of S keys on average).
    """
    s, full = sizes(spec.shape), spec.system.startswith("full")
    layers, width = s["num_hidden_layers"], s["hidden_size"]
    weights = layers * sum(out * into for out, into in layer_sizes(spec.shape))
    head = width * s["vocab_size"]
    attention = layers * 3 * 2 * spec.sequence * width
    adapter = 0 if full else 6 * adapter_parameters(spec.shape, spec.rank)
    passes = 6 if full else 4
    return {"linear": float(passes * weights), "rest": float(passes * head + adapter + attention)}


def ideal_seconds_per_token(spec: Spec, ceiling: dict[str, float]) -> float:
    """At the measured rates of matrix products: an fp8 base at the fp8 rate, everything else at bf16's."""
    flop = flop_per_token(spec)
    rate = ceiling["fp8_tflops" if spec.storage == "fp8" else "bf16_tflops"]
    return flop["linear"] / (rate * 1e12) + flop["rest"] / (ceiling["bf16_tflops"] * 1e12)
