"""A tokenizer as the fields of a GGUF file: those of the base's own GGUF file, or made of a byte-level BPE.

Legend: V rows of the token embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from veneer.data.chat import plain_layout, starts
from veneer.errors import ModelError
from veneer.merge.gguf.splitting import splitting_of
from veneer.model.source import Source

PREFIX = "tokenizer."
TOKENS, TYPES, SCORES = (f"{PREFIX}ggml.{name}" for name in ("tokens", "token_type", "scores"))
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # kinds of tokens, as GGUF numbers them


class Field(NamedTuple):
    """A value, its type and that of its items, by the names of gguf.GGUFValueType."""

    value: Any
    kind: str
    items: str | None = None


Fields = dict[str, Field]


def fields_of(source: Source, tokenizer: Any, rows: int) -> Fields:
    """Key -> field of a tokenizer for a model with so many rows in its embedding.

    Where the base is a GGUF file its own fields are kept, and only tokens that were added since come from
    `tokenizer`. Raises ModelError for a tokenizer that llama.cpp would not spell alike, and where rows are too few.
    """
    file = source.local
    fields = _made(tokenizer) if source.gguf_file is None or file is None else _copied(file)
    fields = _grown(fields, tokenizer, rows)
    template = template_of(tokenizer)
    return {**fields, f"{PREFIX}chat_template": Field(template, "STRING")} if template else fields


def template_of(tokenizer: Any) -> str | None:
    """The chat template by which an adapter was trained: the tokenizer's own, or the plain layout that stands for it.
    None where the tokenizer has several, or no end token."""
    if tokenizer.chat_template:
        return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    return plain_layout(tokenizer, tokenizer.name_or_path) if tokenizer.eos_token is not None else None


def _copied(file: Path) -> Fields:
    from gguf import GGUFReader

    found = {}
    for key, field in GGUFReader(file).fields.items():
        if key.startswith(PREFIX):
            found[key] = Field(field.contents(), *(kind.name for kind in field.types[:2]))
    return found


def _made(tokenizer: Any) -> Fields:
    parts = _parts(tokenizer)
    ids = {token: number for number, token in tokenizer.added_tokens_decoder.items()}
    special = {number for token, number in ids.items() if token.special}
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if sorted(texts) != list(range(len(texts))):
        raise ModelError("the ids of this tokenizer have gaps, which a GGUF file cannot have")
    kinds = [CONTROL if i in special else USER if i in ids.values() else NORMAL for i in range(len(texts))]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    return {
        f"{PREFIX}ggml.model": Field("gpt2", "STRING"),
        f"{PREFIX}ggml.pre": Field(splitting_of(parts), "STRING"),
        TOKENS: Field([texts[i] for i in range(len(texts))], "ARRAY", "STRING"),
        TYPES: Field(kinds, "ARRAY", "INT32"),
        f"{PREFIX}ggml.merges": Field(merges, "ARRAY", "STRING"),
        **_marks(tokenizer),
    }


def _parts(tokenizer: Any) -> Mapping[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, of which a GGUF is made")
    parts: Mapping[str, Any] = json.loads(backend.to_str())
    return parts


def _marks(tokenizer: Any) -> Fields:
    """The special tokens that llama.cpp asks for, and whether texts begin with one."""
    named = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: getattr(tokenizer, f"{attribute}_id", None) for name, attribute in named.items()}
    marks = {f"{PREFIX}ggml.{name}_token_id": Field(i, "UINT32") for name, i in ids.items() if i is not None}
    return {**marks, f"{PREFIX}ggml.add_bos_token": Field(starts(tokenizer), "BOOL")}


def _grown(fields: Fields, tokenizer: Any, rows: int) -> Fields:
    """The same with tokens that were added, and with names for rows that stand for no token."""
    tokens, kinds = list(fields[TOKENS].value), list(fields[TYPES].value)
    for number, token in sorted(tokenizer.added_tokens_decoder.items()):
        spare = [""] * (number + 1 - len(tokens))
        tokens, kinds = tokens + spare, kinds + [UNUSED] * len(spare)
        if tokens[number] != token.content:  # new, or in a row that was there for no token
            tokens[number], kinds[number] = token.content, CONTROL if token.special else USER
    if len(tokens) > rows:
        raise ModelError(f"the tokenizer has {len(tokens)} tokens, the model's embedding {rows} rows")
    lacking = rows - len(tokens)
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(lacking)]
    kinds += [UNUSED] * lacking
    grown = {TOKENS: fields[TOKENS]._replace(value=tokens), TYPES: fields[TYPES]._replace(value=kinds)}
    if SCORES in fields:
        scores = list(fields[SCORES].value)
        grown[SCORES] = fields[SCORES]._replace(value=scores + [0.0] * (rows - len(scores)))
    return {**fields, **grown}


def add_fields(writer: Any, fields: Fields) -> None:
    """Writes them to a gguf.GGUFWriter."""
    from gguf import GGUFValueType

    for key, field in fields.items():
        items = None if field.items is None else GGUFValueType[field.items]
        writer.add_key_value(key, field.value, GGUFValueType[field.kind], items)
