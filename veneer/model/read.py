"""Reads config, tokenizer and weights of a source through transformers; what it cannot read is one ModelError."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from veneer.errors import ModelError, listed
from veneer.model.shards import Shards
from veneer.model.source import Source, unknown
from veneer.model.sources import checkpoint_files
from veneer.model.unpack import unpacked


def opened(source: Source) -> Source:
    """The source as a folder of safetensors where a small GGUF file can be unpacked to one."""
    return unpacked(source, lambda packed: (read_model(packed, torch.float32), read_tokenizer(packed)))


def read_config(source: Source) -> Any:
    """The configuration: sizes, family."""
    try:
        return AutoConfig.from_pretrained(source.place, trust_remote_code=False, **source.options())
    except Exception as error:  # transformers raises many kinds here, all of them meaning "no such model"
        raise unknown(source.name, _first_line(error)) from error


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer; one without a padding token pads with its end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.place, trust_remote_code=False, **source.options())
    except Exception as error:  # as above
        raise unknown(source.name, _first_line(error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model on the CPU."""
    options: dict[str, Any] = {"use_safetensors": True}
    if source.gguf_file:
        from transformers import GgufConfig

        options = {"quantization_config": GgufConfig(dequantize=True), **source.options()}
    model, told = from_pretrained(source, dtype=dtype, **options)
    check_complete(source, told)
    if source.gguf_file:
        forget_quantiser(model)
    return model.eval()


def read_shapes(source: Source) -> PreTrainedModel:
    """The model without weights, on the meta device: its modules, the names of its tensors and their shapes."""
    kind, config = _kind(source), read_config(source)
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise unknown(source.name, _first_line(error)) from error


def from_pretrained(source: Source, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' model and what it tells of missing, unexpected and mismatched tensors."""
    try:
        return _kind(source).from_pretrained(source.place, trust_remote_code=False, output_loading_info=True, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # as above
        if not source.gguf_file:
            Shards(checkpoint_files(source.place))  # names a damaged file, which transformers does not
        raise unknown(source.name, _first_line(error)) from error


def _kind(source: Source) -> Any:
    """transformers' class for models of this family: of those with a language model inside, the whole."""
    known = source.gguf_file or type(read_config(source)) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def check_complete(source: Source, told: dict[str, Any], apart: Iterable[str] = ()) -> None:
    """transformers fills a missing tensor with random numbers, and leaves out what does not fit, with a warning.

    apart: names that we read ourselves.
    """
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {kind: sorted(set(told.get(kind) or ()) - set(apart)) for kind in kinds}
    faults = [f"{kind.replace('_', ' ')}: {', '.join(map(str, names[:5]))}" for kind, names in found.items() if names]
    if faults:
        raise ModelError(listed(f"the checkpoint of {source.name} does not fit its config.json:", faults))


def forget_quantiser(model: PreTrainedModel) -> None:
    """Removes transformers' mark of a quantised model, which would block saving and training."""
    for holder in (model.config, model):
        for name in ("quantization_config", "hf_quantizer", "quantization_method", "_is_quantized"):
            if name in vars(holder):
                delattr(holder, name)
    model.is_quantized = False


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers and gguf while loading: their bars and warnings say nothing that a user could act on."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
