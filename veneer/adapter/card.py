"""An adapter as a value: plain factors of every module, and a card that says where they come from.

Legend: R rank, I in, O out. ΔW = B A; the training scale s is folded into B and remembered on the card only.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, InitVar, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from veneer.adapter.faults import json_faults, method_faults, module_faults, tensor_faults, training_faults
from veneer.adapter.files import Unreadable, escaped, parse_object, read_whole, write_folder
from veneer.adapter.formats import JSON_LIMIT, PeftFolder, read_peft, write_peft
from veneer.adapter.peft_vocabulary import COPIES, EMBEDDINGS, ROWS, vocabulary_faults
from veneer.config.values import MAX_LENGTH
from veneer.errors import AdapterError, ModelError, listed
from veneer.methods import method_class
from veneer.model.fingerprint import Fingerprint

CARD = "veneer.json"
FORMAT = 1
Made = TypeVar("Made")
_FAULTS = 40  # told one by one

# Settings that leave no trace in the forward once training is over: ranks and scale are in the tensors.
# Every other setting counts, so that a new method's settings are part of its identity unless named here.
_TRAINING_ONLY = frozenset(
    "r lora_alpha lora_dropout use_rslora scale init_lora_weights target_modules target_parameters exclude_modules "
    "fan_in_fan_out layers_to_transform rank_pattern alpha_pattern".split()
) | {EMBEDDINGS, COPIES}  # what the base has there


@dataclass(frozen=True)
class Card:
    """What is known about an adapter beside its tensors; veneer.json.

    method: name in the table of methods. settings: its settings. scales: module path -> the scale s of training.
    ranks: module path -> R. base: fingerprint of the base, None where nobody recorded it. base_name: what the user
    called it. storage: how the base was stored while training. template_text: the chat template, for the reader; it
    is never run. training: the record. parents: identities of the adapters this one was made from.
    Raises AdapterError for settings that are not JSON; in the training record such values become text.
    """

    method: str
    settings: dict[str, Any]
    scales: dict[str, float]
    ranks: dict[str, int]
    base: Fingerprint | None = None
    base_name: str | None = None
    storage: str | None = None
    template_text: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    veneer_version: str = ""
    created: str = ""
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Keep copies in the form in which they are read back, so that a card equals itself after a save."""
        try:
            settings = json.loads(json.dumps(self.settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise AdapterError(f"card.settings: {error}. Use numbers, text, lists and objects only.") from error
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "training", _recordable(self.training))
        object.__setattr__(self, "scales", {module: float(scale) for module, scale in sorted(self.scales.items())})
        object.__setattr__(self, "ranks", dict(sorted(self.ranks.items())))
        object.__setattr__(self, "parents", tuple(self.parents))

    @property
    def system_prompt(self) -> str | None:
        """The system prompt of training, None where there was none."""
        return self.training.get("options", {}).get("system_prompt")

    @property
    def max_length(self) -> int:
        """The longest row of training in tokens; where that is not known, what is usual."""
        return self.trained_length or MAX_LENGTH

    @property
    def trained_length(self) -> int | None:
        """The longest row of training in tokens, None where that is not known."""
        return self.training.get("options", {}).get("max_length")

    @property
    def columns(self) -> dict[Any, str]:
        """What the columns of the training data are called, where they had names of their own."""
        return self.training.get("options", {}).get("columns") or {}

    def to_json(self) -> dict[str, Any]:
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**found, "base": self.base and self.base.to_json(), "parents": list(self.parents)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Card:
        """The inverse of `to_json`. Raises AdapterError with every key that is missing, unknown or of another type."""
        if value.get("format") != FORMAT:
            writer = escaped(str(value.get("veneer_version") or "of an unknown version"), 40)
            raise AdapterError(
                f"{CARD}: got format {value.get('format')!r:.80}, wanted {FORMAT}. "
                f"Written by veneer {writer}; use that one."
            )
        needed = [entry.name for entry in fields(cls) if entry.default is MISSING and entry.default_factory is MISSING]
        faults = json_faults(value, {entry.name: str(entry.type) for entry in fields(cls)}, needed)
        base = value.get("base")
        try:
            base = None if base is None else Fingerprint.from_json(base)
        except ModelError as error:
            faults.append(f"base: {error}")
        faults += [] if faults else training_faults(value.get("training", {}))
        if faults:
            next_step = "Restore it, or delete it to load without a card."
            raise AdapterError(listed(f"{CARD} is not understood:", faults, next_step))
        return cls(**{**value, "base": base})


@dataclass(frozen=True, eq=False)
class Adapter:
    """Plain low-rank factors and their card.

    tensors: `<module path>.a` (R, I) and `<module path>.b` (O, R), so that ΔW = b @ a, and for DoRA the magnitudes
    `<module path>.m` (O); `<module path>.rows` (N, D) are rows of tokens, whose ids the card's settings tell. All
    float32, contiguous, on the CPU, finite, sorted by name; copies of what was given, so that training on does not
    change a value. Two adapters are the same if their `identity` is. Raises AdapterError with every fault.

    copied: False hands the tensors over, to whoever holds them nowhere else; it saves their memory once.
    """

    tensors: dict[str, Tensor]
    card: Card
    copied: InitVar[bool] = True

    def __post_init__(self, copied: bool) -> None:
        rows = {name.removesuffix(".rows"): t for name, t in self.tensors.items() if name.endswith(".rows")}
        factors = {name: tensor for name, tensor in self.tensors.items() if not name.endswith(".rows")}
        faults = method_faults(self.card.method) or tensor_faults(factors, method_class(self.card.method).kinds)
        faults += vocabulary_faults(rows, self.card.settings, self.modules())
        if faults := [*faults, *module_faults(factors, self.card.ranks, self.card.scales)]:
            raise AdapterError(listed("Not an adapter:", faults, "Nothing was made."))
        owned = {name: _owned(tensor, copied) for name, tensor in sorted(self.tensors.items())}
        object.__setattr__(self, "tensors", owned)

    @property
    def identity(self) -> str:
        """SHA-256 of all that changes what the adapter computes on its base; computed anew at each call.

        Names, types, shapes and bytes of the tensors; the base's weights, architecture and tokenizer; the method and
        those of its settings that change the forward. Not: template, training record, parents, names, versions.
        """
        base = self.card.base or Fingerprint()
        settings = {key: value for key, value in self.card.settings.items() if key not in _TRAINING_ONLY}
        about = [FORMAT, self.card.method, settings, base.weights, base.architecture, base.tokenizer]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, tensor in self.tensors.items():
            digest.update(json.dumps([name, "F32", list(tensor.shape)]).encode())
            digest.update(tensor.numpy().astype("<f4", copy=False).reshape(-1).data)
        return digest.hexdigest()

    def modules(self) -> list[str]:
        """Paths of the adapted modules, layer 2 before layer 10."""
        return sorted((name.removesuffix(".a") for name in self.tensors if name.endswith(".a")), key=_natural)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """(a_RI, b_OR) of one module. Raises KeyError."""
        return self.tensors[f"{module}.a"], self.tensors[f"{module}.b"]

    def of(self, module: str) -> dict[str, Tensor]:
        """All tensors of one module by kind: a, b and what else its method keeps, or its rows. Raises KeyError."""
        if f"{module}.rows" in self.tensors:
            return {"rows": self.tensors[f"{module}.rows"]}
        return {kind: self.tensors[f"{module}.{kind}"] for kind in method_class(self.card.method).kinds}

    def rows(self) -> dict[str, tuple[list[int], Tensor]]:
        """Module path -> token ids (N) and their rows (N, D), of embedding and head."""
        told = self.card.settings.get(ROWS, {})
        return {module: (ids, self.tensors[f"{module}.rows"]) for module, ids in told.items()}

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Adapter:
        """Read a PEFT folder, with or without a card. Raises AdapterError with every fault.

        With a card, the tensors must be those that it was written for.
        """
        path = Path(folder)
        faults: list[str] = []
        shown = escaped(str(path), 4096)
        if not os.path.isdir(path):  # unlike Path's, False for names that the system cannot have
            wanted = "Wanted a folder with adapter_config.json and adapter_model.safetensors."
            raise AdapterError(f"{shown}: {'a file' if os.path.exists(path) else 'no such folder'}. {wanted}")
        peft = read_peft(path, faults)
        about = _read_card(path, faults)
        identity = about.pop("identity", None) if about is not None else None
        adapter = _try(faults, lambda: cls._from_peft(peft, about))
        if adapter is not None and about is not None and identity != adapter.identity:
            faults.append(
                f"{CARD}: written for identity {identity!r:.80}, the folder holds {adapter.identity}: a file was "
                f"changed or damaged. If that was on purpose, delete {CARD}; it then loads as 'base unverified'"
            )
        if faults or adapter is None:
            more = [f"{len(faults) - _FAULTS} more faults"] if len(faults) > _FAULTS else []
            raise AdapterError(listed(f"{shown} cannot be loaded:", faults[:_FAULTS] + more, "Nothing was loaded."))
        return adapter

    @classmethod
    def _from_peft(cls, peft: PeftFolder | None, about: Mapping[str, Any] | None) -> Adapter | None:
        card = Card.from_json(about) if about is not None else None
        if peft is None:
            return None
        if card is None:
            ranks = {module: len(tensors["a"]) for module, tensors in peft.modules.items()}
            card = Card(peft.method, peft.settings, peft.scales, ranks, base_name=peft.base_name)
        kept = {key: value for key, value in card.settings.items() if key not in (ROWS, EMBEDDINGS, COPIES)}
        card = replace(card, settings=kept | peft.vocabulary)  # of these the folder itself tells
        named = {f"{module}.{kind}": t for module, tensors in peft.modules.items() for kind, t in tensors.items()}
        named |= {f"{module}.rows": tensor for module, tensor in peft.rows.items()}
        return cls(named, card)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write a PEFT folder with a card; other files in the folder stay. Equal adapters give equal bytes.

        Each file appears whole. Should the power fail between two of them, `load` notices by the identity.
        """
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise AdapterError(f"{path}: a file. Wanted a folder, or a new name for one.")
        card = {**self.card.to_json(), "identity": self.identity}
        modules = {module: self.of(module) for module in self.modules()}
        settings = self.card.settings
        transposed, embeddings = bool(settings.get("fan_in_fan_out")), settings.get(EMBEDDINGS, [])
        try:
            files = write_peft(modules, self.card.base_name, transposed, embeddings, self.rows())
        except ValueError as error:
            raise AdapterError(f"{path}: no PEFT folder holds this adapter: {error}. Nothing was written.") from error
        files[CARD] = (json.dumps(card, indent=2, sort_keys=True) + "\n").encode()
        try:
            write_folder(path, files)
        except OSError as error:
            raise AdapterError(f"{path}: cannot be written ({error}). Choose another folder or make room.") from error
        return path


def _owned(tensor: Tensor, copied: bool) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=copied).contiguous()


def _natural(module: str) -> list[tuple[int, int | str]]:
    """Sort key that reads digits as numbers; a number comes before a word."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"[.]|(?<=\D)(?=\d)", module)]


def _recordable(value: Any) -> Any:
    """JSON made of any record: what JSON lacks becomes text, so that a finished training can always be saved."""
    if isinstance(value, Mapping):
        return {str(key): _recordable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_recordable(item) for item in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):  # numpy's too
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else str(value)


def _try(faults: list[str], make: Callable[[], Made]) -> Made | None:
    """What `make` returns; None, and its message among the faults, where it raises AdapterError."""
    try:
        return make()
    except AdapterError as error:
        faults.append(str(error))
        return None


def _read_card(folder: Path, faults: list[str]) -> dict[str, Any] | None:
    if not os.path.lexists(folder / CARD):
        return None
    try:
        return parse_object(read_whole(folder / CARD, JSON_LIMIT), CARD)
    except Unreadable as error:
        faults.append(str(error))
        return None
