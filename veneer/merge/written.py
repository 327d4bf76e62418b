"""The forms in which a merged model is written, and read again to see what came of it: the table WRITERS."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.merge.gguf.family import FILE, family_of
from veneer.merge.gguf.model_file import read_model, write_model
from veneer.merge.gguf.ollama import write_modelfile
from veneer.model.load import load
from veneer.model.source import Source


@dataclasses.dataclass(frozen=True)
class Merged:
    """A merged model in its dtype, its tokenizer, where the base came from, the storage that it is to have, and the
    system prompt of training."""

    model: PreTrainedModel
    tokenizer: Any
    dtype: torch.dtype
    source: Source
    storage: str
    system_prompt: str | None


@dataclasses.dataclass(frozen=True)
class Writer:
    """check: raises ModelError, before any work, for a model that has no such form. write: into a folder that is not
    there yet, returns notes. read: the model of that folder."""

    check: Callable[[nn.Module], Any]
    write: Callable[[Path, Merged], list[str]]
    read: Callable[[Path, Merged], nn.Module]


def _write_folder(folder: Path, merged: Merged) -> list[str]:
    if merged.storage == "dense":
        _save(merged.model, merged.tokenizer, folder)
        return []
    dense = folder.with_name(f"{folder.name}.dense")
    try:
        _save(merged.model, merged.tokenizer, dense)
        name = str(merged.dtype).removeprefix("torch.")
        packed = load(str(dense), name, device="cpu", storage=merged.storage, check=False, progress=False)
        _save(packed.model, merged.tokenizer, folder)
    finally:
        shutil.rmtree(dense, ignore_errors=True)
    return []


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode  # safetensors writes for the owner alone, whatever the umask says
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)


def _read_folder(folder: Path, merged: Merged) -> nn.Module:
    """By transformers; what is stored in 4 bits by veneer, since transformers has others read it."""
    if merged.storage == "dense":
        model: nn.Module = type(merged.model).from_pretrained(folder, dtype=merged.dtype)
        return model
    return load(str(folder), str(merged.dtype).removeprefix("torch."), device="cpu", check=False, progress=False).model


def _write_gguf(folder: Path, merged: Merged) -> list[str]:
    folder.mkdir(parents=True)
    write_model(folder, merged.model, merged.tokenizer, merged.source)
    return write_modelfile(folder, f"./{FILE}", merged.tokenizer, merged.system_prompt)


def _read_gguf(folder: Path, merged: Merged) -> nn.Module:
    return read_model(folder, merged.model.config, merged.dtype)


# --format -> how
WRITERS = {
    "transformers": Writer(lambda model: None, _write_folder, _read_folder),
    "gguf": Writer(lambda model: family_of(model.config), _write_gguf, _read_gguf),
}
