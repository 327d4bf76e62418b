"""What a PEFT folder says of token embedding and vocabulary head: their tensors, and what a card keeps of it.

Legend: N tokens that are trained, V vocabulary, D hidden size, R rank.

An adapted embedding has `lora_embedding_A` (R, V) and `lora_embedding_B` (D, R): factors as of a linear layer over
one-hot tokens, and so they are here. Trained rows are `token_adapter.trainable_tokens_delta` (N, D), the rows
themselves, whatever the name says; whose they are stands in the config. Beside either there may be a copy of the base's
whole weight, of which nothing is kept but a hash: it has to be the base's (`veneer.adapter.tokens`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.adapter.faults import add_fault, finite, is_module
from veneer.model.added_tokens import spelling_faults

PREFIX = "base_model.model."
# Entries of a card's settings.
ROWS = "trainable_token_indices"  # module path -> token ids, one for each of its rows; PEFT's name for it
EMBEDDINGS = "embeddings"  # paths of the modules that are embeddings
COPIES = "base_copies"  # module path -> hash of the copy of its weight that was in the folder
ADDED = "added_tokens"  # [text, id] of each token that was added to the base's tokenizer, by id
_FACTORS = {"lora_embedding_A": "lora_A.weight", "lora_embedding_B": "lora_B.weight"}
_DELTA = "token_adapter.trainable_tokens_delta"
_COPY = ("token_adapter.base_layer.weight", "base_layer.weight")
_MOST = 8  # modules whose rows are tokens; models have two
_COPIED = ("embed_tokens", "lm_head")  # what PEFT copies whole, where it is asked to


@dataclass
class Vocabulary:
    """What was found beside the factors of linear layers."""

    embeddings: list[str] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    def settings(self, config: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
        """The entries of a card's settings. Faults: rows without ids, ids without rows, ids that are none."""
        told: dict[str, Any] = {EMBEDDINGS: sorted(self.embeddings), COPIES: dict(sorted(self.copies.items()))}
        told[ROWS] = _ids_of(config.get(ROWS), self.rows, faults)
        return {name: value for name, value in told.items() if value}


def taken_out(tensors: Mapping[str, Tensor], faults: list[str]) -> tuple[dict[str, Tensor], Vocabulary]:
    """The other tensors, an embedding's factors among them under the names of a linear layer's; and what was found."""
    found, rest = Vocabulary(), dict(tensors)
    for key in tensors:
        module, kind = _parted(key)
        if kind in _FACTORS and f"{PREFIX}{module}.{_FACTORS[kind]}" not in tensors:
            rest[f"{PREFIX}{module}.{_FACTORS[kind]}"] = rest.pop(key)
            found.embeddings += [] if module in found.embeddings else [module]
        elif kind == _DELTA:
            found.rows[module] = rest.pop(key)
        elif kind == "copy":
            found.copies[module] = digest(rest.pop(key))
    flat = [f"{m} {list(t.shape)}" for m, t in found.rows.items() if t.dim() != 2 or not t.numel()]
    add_fault(faults, "trained rows that are no matrix (wanted [tokens, hidden size])", flat)
    return rest, found


def _parted(key: str) -> tuple[str, str]:
    """Module path and kind of a key that is ours to read, else two empty texts."""
    if key.startswith(PREFIX):
        path = key.removeprefix(PREFIX)
        for name in (*_FACTORS, _DELTA, *_COPY, "weight"):
            module = path.removesuffix(f".{name}")
            if module == path or not is_module(module):
                continue
            if name == "weight" and module.rpartition(".")[2] not in _COPIED:
                continue
            return module, name if name in _FACTORS or name == _DELTA else "copy"
    return "", ""


def digest(weight: Tensor) -> str:
    """SHA-256 of a weight's shape and of its values as bfloat16: the same whether a copy is in float32 or as stored."""
    told = hashlib.sha256(str(tuple(weight.shape)).encode())
    told.update(weight.detach().to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().data)
    return told.hexdigest()


def _ids_of(given: Any, rows: Mapping[str, Tensor], faults: list[str]) -> dict[str, list[int]]:
    """Module path -> token ids, of what the config says."""
    if not given and not rows:
        return {}
    named = given if isinstance(given, dict) else {next(iter(rows), "embed_tokens"): given}
    if not all(isinstance(name, str) and _is_ids(ids) for name, ids in named.items()):
        faults.append(f"{ROWS}: got {given!r:.80}, wanted different token ids, or an object of such lists")
        return {}
    if len(named) > _MOST or len(rows) > _MOST:
        faults.append(f"{ROWS}: got {len(named)} modules and rows of {len(rows)}, wanted at most {_MOST}")
        return {}
    ids = {path: next((named[n] for n in named if path == n or path.endswith(f".{n}")), None) for path in rows}
    add_fault(faults, f"trained rows that {ROWS} does not name", [path for path in rows if ids[path] is None])
    present = [known for known in ids.values() if known is not None]
    # PEFT keeps one copy of what a tied head and its embedding share.
    bare = [n for n in named if not any(p == n or p.endswith(f".{n}") for p in rows) and named[n] not in present]
    add_fault(faults, f"{ROWS} names modules without rows (wanted {_DELTA})", [f"{name!r:.80}" for name in bare])
    found = {path: known for path, known in ids.items() if known is not None}
    counts = {path: (len(known), len(rows[path])) for path, known in found.items() if rows[path].dim()}
    uneven = [f"{path} ({told} ids, {held} rows)" for path, (told, held) in counts.items() if told != held]
    add_fault(faults, "as many ids as rows are wanted", uneven)
    return dict(sorted(found.items()))


def _is_ids(ids: Any) -> bool:
    whole = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    return whole and 0 < len(ids) == len(set(ids))


def vocabulary_faults(rows: Mapping[str, Tensor], settings: Mapping[str, Any], modules: list[str]) -> list[str]:
    """What is wrong with the rows (module path -> tensor) of an adapter's value, and with what its settings say."""
    faults: list[str] = []
    told = settings.get(ROWS, {})
    if not isinstance(told, dict) or set(told) != set(rows) or not all(map(_is_ids, told.values())):
        faults.append(f"settings.{ROWS}: got {told!r:.200}, wanted different token ids for each of {sorted(rows)}")
    else:
        uneven = {path: t for path, t in rows.items() if t.dim() != 2 or len(t) != len(told[path])}
        odd = [f"{path} {list(t.shape)}, {len(told[path])} ids" for path, t in uneven.items()]
        add_fault(faults, "rows (wanted [tokens, hidden size], a row for each id)", odd)
    add_fault(faults, "rows with an empty side", [path for path, t in rows.items() if not t.numel()])
    add_fault(faults, "rows that are not floating point", [p for p, t in rows.items() if not t.is_floating_point()])
    add_fault(faults, "NaN or infinite values", [f"{path}.rows" for path, t in rows.items() if not finite(t)])
    add_fault(faults, "both rows and factors", sorted(set(rows) & set(modules)))
    embeddings = settings.get(EMBEDDINGS, [])
    if not isinstance(embeddings, list) or not set(map(str, embeddings)) <= set(modules):
        faults.append(f"settings.{EMBEDDINGS}: got {embeddings!r:.200}, wanted adapted modules")
    faults += added_faults(settings, told if isinstance(told, dict) else {})
    copies = settings.get(COPIES, {})
    if not isinstance(copies, dict) or not all(isinstance(value, str) for value in copies.values()):
        faults.append(f"settings.{COPIES}: got {copies!r:.200}, wanted module paths with hashes")
    return faults


def added_faults(settings: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
    """What is wrong with a card's added tokens. rows: module path -> token ids."""
    told = settings.get(ADDED, [])
    if not isinstance(told, list) or not all(map(_is_added, told)):
        return [f"settings.{ADDED}: got {told!r:.200}, wanted a list of [text, token id]"]
    if not told:
        return []
    ids = [token for _, token in told]
    faults = [f"settings.{ADDED}: {fault}" for fault in spelling_faults([text for text, _ in told])]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        faults.append(f"settings.{ADDED}: got ids {ids!r:.80}, wanted each one more than the one before")
    lacking = [path for path, held in rows.items() if not set(ids) <= set(held if _is_ids(held) else [])]
    add_fault(faults, f"settings.{ADDED}: tokens without a row", lacking or ([] if rows else ["no module has rows"]))
    return faults


def _is_added(told: Any) -> bool:
    return isinstance(told, list) and len(told) == 2 and isinstance(told[0], str) and _is_ids(told[1:])


def keys_of(module: str, kinds: Mapping[str, str], is_embedding: bool) -> dict[str, str]:
    """kind -> key in the file, of one module's factors. kinds: kind -> name, of a linear layer."""
    names = dict(kinds)
    if is_embedding:
        names |= {"a": "lora_embedding_A", "b": "lora_embedding_B"}
    return {kind: f"{PREFIX}{module}.{name}" for kind, name in names.items()}


def row_key(module: str) -> str:
    """The key of a module's rows in the file."""
    return f"{PREFIX}{module}.{_DELTA}"
