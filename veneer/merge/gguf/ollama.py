"""The Modelfile of a tokenizer: what it takes from chat template, special tokens and the prompt of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.data.chat import starts
from veneer.merge.gguf.modelfile import NAME, Layout, Message, layout_of, modelfile, spellable
from veneer.merge.gguf.vocabulary import template_of


def write_modelfile(
    folder: Path, model: str, tokenizer: Any, system: str | None = None, adapter: str | None = None
) -> list[str]:
    """Writes it into the folder and returns notes: what it could not say. Arguments as of `modelfile`."""
    template, layout = template_of(tokenizer), None

    def render(messages: list[Message], opened: bool) -> str:
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": opened}
        return str(tokenizer.apply_chat_template(messages, **options))

    if template is not None:
        layout = layout_of(render, tokenizer.bos_token)
    text = modelfile(model, adapter, _begun(layout, tokenizer), system, _stops(layout, tokenizer))
    (folder / NAME).write_text(text, encoding="utf-8")
    notes = []
    if system and not spellable(system):
        notes.append(
            f"{NAME} has no SYSTEM: the prompt of training has quotes that it cannot hold; give it when asking"
        )
    if layout is not None:
        return notes
    return [
        *notes,
        f"{NAME} has no TEMPLATE: the chat template is more than words around each role's; write one of Go's there",
    ]


def _begun(layout: Layout | None, tokenizer: Any) -> Layout | None:
    """Without the start token, where llama.cpp puts that before a text by itself."""
    return layout._replace(start="") if layout is not None and starts(tokenizer) else layout


def _stops(layout: Layout | None, tokenizer: Any) -> list[str]:
    """The end token, and the special token that closes an assistant's turn."""
    closing = layout.assistant[1].strip() if layout is not None else ""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return list(dict.fromkeys(stop for stop in (tokenizer.eos_token, closing) if stop and stop in special))
