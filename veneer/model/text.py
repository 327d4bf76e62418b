"""The part of a model that reads text: all of most models, the language model of one that sees or hears as well."""

from __future__ import annotations

from typing import Any

from torch import nn

POSITIONS = ("wpe", "embed_positions", "position_embeddings")
NAMES = ("language_model", "text_model", "decoder")


def is_multimodal(model: Any) -> bool:
    """Whether the config is that of several models, one of them a language model."""
    config: Any = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and config.get_text_config() is not config


def body_of(model: Any) -> nn.Module:
    """What gives the hidden states that the vocabulary head reads."""
    body = model.base_model
    if body is model:  # Llama 4 text: its prefix is that of the whole
        body = getattr(model, "model", model)
    if not is_multimodal(model):
        return body
    return next((getattr(body, name) for name in NAMES if isinstance(getattr(body, name, None), nn.Module)), body)


def learned_positions(model: Any) -> int | None:
    """How many positions a model knows that has an embedding of them, as GPT-2 and OPT; None: any number."""
    tables = [
        module
        for path, module in body_of(model).named_modules()
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in POSITIONS
    ]
    return text_config(model).max_position_embeddings if tables else None


def text_modules(model: nn.Module) -> set[nn.Module]:
    """All modules of the part that reads text, the vocabulary head among them."""
    if not is_multimodal(model):
        return set(model.modules())
    head = model.get_output_embeddings()
    return {*body_of(model).modules(), *(() if head is None else head.modules())}


def text_config(model: Any) -> Any:
    """The config of the part that reads text: sizes, positions."""
    return model.config.get_text_config()
