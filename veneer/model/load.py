"""Loads a base model through transformers, swaps its leaves, stamps its fingerprint, and probes the packed path."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from veneer.errors import ModelError, listed
from veneer.model import fingerprint as fingerprints
from veneer.model.probe import probe
from veneer.model.source import Source, resolve, unknown
from veneer.model.sources import checkpoint_files
from veneer.model.swap import swap_norms
from veneer.model.unpack import unpacked

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def load(name: str, dtype: str = "auto", device: str = "auto", check: bool = True, tokenizer: Any = None) -> Loaded:
    """The base model `name`: 'smollm2', a GGUF file, a local folder or a hub id.

    dtype: 'float32', 'bfloat16', or 'auto' (bfloat16 where the machine multiplies it fast, else float32).
    check: probe that packed segments equal each alone (a fraction of a second); a family that fails is refused by name.
    tokenizer: the model's, where it is loaded already.
    Raises ModelError.
    """
    source, place = resolve(name), _device(device)
    chosen = fastest_dtype(place) if dtype == "auto" else DTYPES.get(dtype)
    if chosen is None:
        raise ModelError(f"dtype {dtype!r}: wanted one of auto, {', '.join(DTYPES)}")
    with _quiet():
        tokenizer, model = tokenizer or _tokenizer(source), _model(source, chosen)
    prepare(model)
    model.to(place)
    model.veneer_source, model.veneer_stored_dtype = source, _stored_dtype(source)
    model.veneer_fingerprint = _fingerprint(source, model, tokenizer)
    if check:
        probe(model)
    return Loaded(model, tokenizer, model.veneer_fingerprint, name, f"dense {str(chosen).removeprefix('torch.')}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone, for verbs that need no weights."""
    with _quiet():
        return _tokenizer(resolve(name))


def load_config(name: str) -> Any:
    """The configuration alone: sizes, family."""
    with _quiet():
        source = _opened(resolve(name))
        try:
            return AutoConfig.from_pretrained(source.place, trust_remote_code=False, **source.options())
        except Exception as error:  # transformers raises many kinds here, all of them meaning "no such model"
            raise unknown(source.name, _first_line(error)) from error


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
    return torch.device(device)


def _opened(source: Source) -> Source:
    return unpacked(source, lambda packed: (_read_model(packed, torch.float32), _read_tokenizer(packed)))


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    return _read_tokenizer(_opened(source))


def _model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    return _read_model(_opened(source), dtype)


def _read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.place, trust_remote_code=False, **source.options())
    except Exception as error:  # transformers raises many kinds here, all of them meaning "no such tokenizer"
        raise unknown(source.name, _first_line(error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True, **source.options()}
    if source.gguf_file:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
        del options["use_safetensors"]
    try:
        model, told = AutoModelForCausalLM.from_pretrained(source.place, output_loading_info=True, **options)
    except Exception as error:  # as above
        raise unknown(source.name, _first_line(error)) from error
    _check_complete(source, told)
    if source.gguf_file:
        _forget_gguf(model)
    if getattr(model.config, "quantization_config", None) is not None:
        kind = getattr(model.config.quantization_config, "quant_method", "an unknown way")
        raise ModelError(
            f"{source.name} is quantised ({kind}); this version trains on dense weights: name the original model"
        )
    return model.eval()


def _check_complete(source: Source, told: dict[str, Any]) -> None:
    """transformers fills a missing tensor with random numbers, and leaves out what does not fit, with a warning."""
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    faults = [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(told[kind])[:5]))}" for kind in kinds if told.get(kind)
    ]
    if faults:
        raise ModelError(listed(f"the checkpoint of {source.name} does not fit its config.json:", faults))


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


def _forget_gguf(model: PreTrainedModel) -> None:
    """The weights are dense now; a left-over quantisation mark would block saving and training."""
    for holder in (model.config, model):
        for name in ("quantization_config", "hf_quantizer", "quantization_method"):
            if hasattr(holder, name):
                delattr(holder, name)
    model.is_quantized = False


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers and gguf while loading: their bars and warnings say nothing that a user could act on."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
