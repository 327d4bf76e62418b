"""A dense model as one GGUF file, and the model that transformers reads out of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from veneer.merge.gguf.family import FILE, describe, family_of
from veneer.merge.gguf.tensors import TYPES, add_tensor, tensors_of
from veneer.merge.gguf.vocabulary import add_fields, fields_of
from veneer.model.read import check_complete, forget_quantiser, from_pretrained, quiet
from veneer.model.source import Source


def write_model(folder: Path, model: PreTrainedModel, tokenizer: Any, source: Source) -> None:
    """Writes `model.gguf` into the folder: matrices in the model's dtype, vectors in float32.

    source: where the base came from; a GGUF file's own tokenizer fields are kept. Raises ModelError for a family,
    setting or tokenizer without an exact form there.
    """
    from gguf import GGUFWriter, LlamaFileType

    family = family_of(model.config)
    tensors = tensors_of(model, family)
    fields = fields_of(source, tokenizer, model.config.vocab_size)
    writer = GGUFWriter(folder / FILE, family.arch)
    writer.add_type("model")
    writer.add_name(Path(source.name).name)
    kind = TYPES[model.dtype]
    writer.add_file_type(LlamaFileType.ALL_F32 if kind == "F32" else LlamaFileType[f"MOSTLY_{kind}"])
    describe(writer, model.config)
    add_fields(writer, fields)
    for name, tensor in tensors.items():
        add_tensor(writer, name, tensor)
    write(writer)


def write(writer: Any) -> None:
    """Writes what a gguf.GGUFWriter was given, and closes it."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_model(folder: Path, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `model.gguf` by transformers. config: of what was written, since transformers reads neither the
    size of heads nor scaled rotations from GGUF."""
    from transformers import GgufConfig

    source = Source(FILE, str(folder), FILE)
    options = {"config": config, "dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
    with quiet():
        model, told = from_pretrained(source, **source.options(), **options)
    check_complete(source, told)
    forget_quantiser(model)
    return model.eval()
