"""Small models of each family that has a GGUF, with a byte-level BPE, as folders; and adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import CHATML, DIGITS
from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.merge.gguf.splitting import SPLITTINGS
from veneer.model.load import load

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> model_type, what else the config says. Heads of 16 in Qwen3: not its hidden size over its heads.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def tokenizer_cutting(name: str) -> Any:
    """A tokenizer that cuts texts in the way that llama.cpp calls `name`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    [steps] = [steps for steps, known in SPLITTINGS.items() if known == name]
    made = {
        "digits": pre_tokenizers.Digits(individual_digits=True),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "byte level": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    parts = [made.get(step) or pre_tokenizers.Split(Regex(step), behavior="isolated") for step in steps]
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"user assistant Write {' '.join(DIGITS)}", "It's 2024 or 12345", "don't\n\n know,  that!", "été 你好 :)"]
    backend.train_from_iterator(texts * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """model_folder(name in MODELS, name in SPLITTINGS): a random model; its embedding has more rows than tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[tuple[str, str], Path] = {}

    def make(name: str, cutting: str = "gpt-2") -> Path:
        if (name, cutting) in made:
            return made[name, cutting]
        tokenizer, (family, more) = tokenizer_cutting(cutting), MODELS[name]
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model(
            family,
            vocab_size=len(tokenizer) + 5,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=2,
            initializer_range=0.3,  # with the usual 0.02 attention is uniform, and a lost rotation would go unseen
            **{"tie_word_embeddings": False, **sizes, **more},
        )
        folder = tmp_path_factory.mktemp("base") / name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float()
            for path, parameter in model.named_parameters():
                if path.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name, cutting] = folder
        return folder

    return make


def save_adapter(base: Path, folder: Path, size: float = 0.1, **settings: Any) -> Path:
    """An adapter that matters, on all linear layers unless the settings say where."""
    model = attach(load(str(base), "float32", device="cpu").model, LoraSettings(**{"r": 4, **settings}), seed=1)
    plain, generator = take(model, base_name=str(base)), torch.Generator().manual_seed(2)
    tensors = {
        name: size * torch.randn(value.shape, generator=generator) if name.endswith(".b") else value
        for name, value in plain.tensors.items()
    }
    Adapter(tensors, plain.card).save(folder)
    return folder
