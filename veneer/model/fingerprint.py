"""What a base model is, in four hashes: weights, architecture, tokenizer, template.

An adapter records the fingerprint of the base it was trained on; `compare` says which parts of another base differ.
Storage (bfloat16, 4 bits, ...) is not part of it: the weights are those of the checkpoint files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from veneer.errors import ModelError, listed
from veneer.model.architecture import settings_of
from veneer.model.samples import FLOAT, Sample, positions, samples_of
from veneer.model.sources import checkpoint_files as checkpoint_files  # for the loader

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Difference:
    """One part of two fingerprints that is known on both sides and differs."""

    part: str
    adapter: str
    model: str


@dataclass(frozen=True)
class Fingerprint:
    """Four SHA-256 in hexadecimal, each of which may be "unknown"."""

    weights: str = UNKNOWN
    architecture: str = UNKNOWN
    tokenizer: str = UNKNOWN
    template: str = UNKNOWN

    def to_json(self) -> dict[str, str]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, value: Any) -> Fingerprint:
        """The inverse of `to_json`. Raises ModelError that lists every missing, unknown or malformed part."""
        names = [field.name for field in fields(cls)]
        given = value if isinstance(value, Mapping) else {}
        faults = [f"{name}: missing" for name in names if name not in given]
        faults += [f"{name!r:.80}: not one of {', '.join(names)}" for name in list(given)[:8] if name not in names]
        faults += [f"{name}: got {given[name]!r:.80}" for name in names if name in given and not _is_hash(given[name])]
        if faults:
            wanted = f'Wanted an object of 64 hexadecimal digits or "{UNKNOWN}" under each of {", ".join(names)}.'
            raise ModelError(listed("Not a fingerprint:", faults, wanted))
        return cls(**given)


def compare(adapter: Fingerprint, model: Fingerprint) -> list[Difference]:
    """The parts known on both sides that differ. A part unknown on either side is no difference."""
    pairs = [(part, getattr(adapter, part), getattr(model, part)) for part in adapter.to_json()]
    return [Difference(*pair) for pair in pairs if UNKNOWN not in pair[1:] and pair[1] != pair[2]]


def weights_of(files: Sequence[Path]) -> str:
    """SHA-256 over 64 fixed positions of every tensor of a checkpoint (safetensors in one or many files, or GGUF).

    Names, shapes and values count; how the tensors are spread over files, and whether a value is stored as float32
    or as a narrower float, do not. Raises ModelError where a file is missing, truncated or repeats a tensor.
    """
    if not files:
        raise ModelError("No checkpoint file to take a fingerprint of. Give the safetensors or GGUF files.")
    return _hash_of_samples(_samples_of_all(files))


def architecture_of(config: Any) -> str:
    """SHA-256 over the settings of a transformers config that change the computation; not names, versions, dtype."""
    return _hash_of_json(settings_of(config))


def tokenizer_of(tokenizer: Any) -> str:
    """SHA-256 over all that decides which ids a text becomes: vocabulary, merges, added tokens, normaliser,
    pre-tokeniser. Neither the chat template nor passing state (padding, truncation) counts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _hash_of_json({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()})
    parts = json.loads(backend.to_str())
    model = {key: value for key, value in parts["model"].items() if key != "dropout"}
    if "merges" in model:  # pairs or "left right", depending on the version of `tokenizers`
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    # `special` only matters to decoding
    added = [{key: value for key, value in token.items() if key != "special"} for token in parts["added_tokens"]]
    return _hash_of_json([model, added, parts["normalizer"], parts["pre_tokenizer"]])


def template_of(tokenizer: Any) -> str:
    """SHA-256 of the chat template; of nothing where there is none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return _hash_of_text(template if isinstance(template, str) else json.dumps(template, sort_keys=True))


def of(model: Any, tokenizer: Any = None) -> Fingerprint:
    """The fingerprint of a model in memory.

    The loader's stamp (`model.veneer_fingerprint`) is believed. Without one, `model.name_or_path` is looked up
    locally (file, folder, hub cache; never the network); the weights are "unknown" if nothing is found there or if
    the model's values are no longer those of the files.
    """
    stamp: Fingerprint | None = getattr(model, "veneer_fingerprint", None)
    return Fingerprint(
        weights=stamp.weights if stamp else _weights_of_source(model),
        architecture=architecture_of(model.config),
        tokenizer=tokenizer_of(tokenizer) if tokenizer is not None else stamp.tokenizer if stamp else UNKNOWN,
        template=template_of(tokenizer) if tokenizer is not None else stamp.template if stamp else UNKNOWN,
    )


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and (value == UNKNOWN or re.fullmatch("[0-9a-f]{64}", value) is not None)


def _hash_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _hash_of_json(value: Any) -> str:
    return _hash_of_text(json.dumps(value, sort_keys=True))


def _samples_of_all(files: Sequence[Path]) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    for file in sorted(map(Path, files)):
        found = samples_of(file)
        if twice := sorted(samples.keys() & found.keys()):
            raise ModelError(
                f"{file}: tensors that another of the files holds too: {', '.join(twice[:5])} ({len(twice)} in all). "
                "Give the files of one checkpoint only."
            )
        samples |= found
    return samples


def _hash_of_samples(samples: Mapping[str, Sample]) -> str:
    digest = hashlib.sha256()
    for name, sample in sorted(samples.items()):
        digest.update(json.dumps([name, sample.kind, sample.shape, len(sample.data)]).encode())
        digest.update(sample.data)
    return digest.hexdigest()


def _weights_of_source(model: Any) -> str:
    name = getattr(model, "name_or_path", None) or ""
    try:
        files = checkpoint_files(name, getattr(model.config, "_commit_hash", None)) if name else []
        samples = _samples_of_all(files)
    except ModelError:  # a broken or half-downloaded source proves nothing either way
        return UNKNOWN
    return _hash_of_samples(samples) if samples and _still_as_stored(model, samples) else UNKNOWN


def _still_as_stored(model: Any, samples: Mapping[str, Sample]) -> bool:
    """False where a parameter no longer has its stored value: merging and training keep `name_or_path`."""
    import torch  # heavy

    for name, tensor in model.state_dict().items():
        sample = samples.get(name)
        if sample is None or sample.kind != FLOAT or tuple(tensor.shape) != sample.shape or tensor.is_meta:
            continue
        if not (tensor.is_floating_point() and tensor.is_contiguous()):
            continue
        got = tensor.detach().reshape(-1)[torch.from_numpy(positions(tensor.numel())).to(tensor.device)].cpu()
        stored = torch.from_numpy(np.frombuffer(sample.data, "<f4").copy()).to(got.dtype)
        if not torch.equal(got, stored):
            return False
    return True
