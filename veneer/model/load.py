"""Loads a base model through transformers, swaps its leaves, stamps its fingerprint, and probes the packed path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import ModelError
from veneer.model import bnb
from veneer.model import fingerprint as fingerprints
from veneer.model.probe import probe
from veneer.model.quantised import Way, check_way, read_quantised
from veneer.model.read import opened, quiet, read_config, read_model, read_tokenizer
from veneer.model.source import Source, resolve
from veneer.model.sources import checkpoint_files
from veneer.model.swap import swap_norms

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass
class Loaded:
    """A frozen base model, ready for adapters. Unpacks as `model, tokenizer = load(...)`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: fingerprints.Fingerprint
    name: str
    storage: str  # how the weights are held: 'dense bfloat16'

    def __iter__(self) -> Iterator:
        return iter((self.model, self.tokenizer))


def load(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    check: bool = True,
    tokenizer: Any = None,
    storage: str = "dense",
    progress: bool = True,
) -> Loaded:
    """The base model `name`: 'smollm2', a GGUF file, a local folder or a hub id.

    dtype: 'float32', 'bfloat16', 'float16', or 'auto' (bfloat16 where the machine multiplies it fast, else float32).
    check: probe that packed segments equal each alone (a fraction of a second); a family that fails is refused by name.
    tokenizer: the model's, where it is loaded already.
    storage: how linear layers but the vocabulary head are held, a name of `veneer.bases.BASES`: quantised tensor by
    tensor as they are read, so that the dense model never exists as a whole. A checkpoint of bitsandbytes in 4 bits
    is loaded as it is. dtype is then that of the products, and of what stays dense.
    progress: a bar on standard error, where that takes a while.
    Raises ModelError.
    """
    source, place = resolve(name), _device(device)
    chosen = fastest_dtype(place) if dtype == "auto" else DTYPES.get(dtype)
    if chosen is None:
        raise ModelError(f"dtype {dtype!r}: wanted one of auto, {', '.join(DTYPES)}")
    with quiet():
        files = opened(source)
        tokenizer = tokenizer or read_tokenizer(files)
        way = _way(files, Way(storage, chosen, place))
    with _enough_memory(way):
        model = _model(files, way, progress)
        prepare(model)
        model.to(place)
    model.veneer_source, model.veneer_stored_dtype = source, _stored_dtype(source)
    model.veneer_fingerprint, model.veneer_tokenizer = _fingerprint(source, model, tokenizer), tokenizer
    if check:
        probe(model)
    return Loaded(model, tokenizer, model.veneer_fingerprint, name, str(way))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, for verbs that need no weights."""
    with quiet():
        return read_tokenizer(opened(resolve(name)))


def load_config(name: str) -> Any:
    """The configuration alone: sizes, family."""
    with quiet():
        return read_config(opened(resolve(name)))


def prepare(model: nn.Module) -> None:
    """Freezes a model and swaps its norms; linear layers are swapped as adapters name them (`veneer.attach`)."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    swap_norms(model)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs with AVX-512 bf16 or AMX products; else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ModelError(f"device {device!r}: wanted auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f"device {device!r} was asked for and torch sees no CUDA GPU; "
            "next: device='cpu', or install a CUDA build of torch"
        )
    place = torch.device(device)
    if place.index is not None:
        torch.cuda.set_device(place)  # where kernels are launched
    return place


def _way(source: Source, asked: Way) -> Way:
    """What was asked for, or what the checkpoint is stored as. Raises ModelError where the two contradict."""
    config = None if source.gguf_file else read_config(source)
    stored = bnb.stored_as(source.name, getattr(config, "quantization_config", None))
    way = asked if stored is None else dataclasses.replace(asked, storage=bnb.agree(source.name, stored, asked.storage))
    check_way(way)
    return dataclasses.replace(way, packed=stored is not None)


def _model(source: Source, way: Way, progress: bool) -> PreTrainedModel:
    if way.storage != "dense":
        return read_quantised(source, way, progress)
    with quiet():
        return read_model(source, way.dtype)


@contextmanager
def _enough_memory(way: Way) -> Iterator[None]:
    """What to try when the model does not fit."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        smaller = {"dense": "--load-in-8bit or --load-in-4bit", "nf4": "--bnb-4bit-use-double-quant"}
        advice = smaller.get(way.storage, "--load-in-4bit --bnb-4bit-use-double-quant")
        advice = "" if way.storage == "nf4-dq" else f"{advice}, "
        where = f"on {way.device}" if way.device.type == "cuda" else "in this machine's memory"
        raise ModelError(
            f"the base model does not fit {where} as {way}; next: {advice}a smaller base, a larger device, "
            "or end what else uses this one"
        ) from error


def _stored_dtype(source: Source) -> torch.dtype:
    """The dtype that the checkpoint says it is in; GGUF values are no bfloat16 numbers."""
    if source.gguf_file:
        return torch.float32
    config = AutoConfig.from_pretrained(source.place, trust_remote_code=False, **source.options())
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _fingerprint(
    source: Source, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> fingerprints.Fingerprint:
    """The weights' part comes from the files, whatever dtype they were loaded in."""
    files = checkpoint_files(str(source.local or source.place))
    found = fingerprints.of(model, tokenizer)
    return dataclasses.replace(found, weights=fingerprints.weights_of(files)) if files else found
