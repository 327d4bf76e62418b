"""Two checkpoints of one architecture, a base and what was tuned from it, read side by side, a tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.adapter.faults import add_fault
from veneer.errors import ModelError, listed
from veneer.model import bnb
from veneer.model.architecture import settings_of
from veneer.model.read import opened, quiet, read_config, read_shapes
from veneer.model.shards import Shards
from veneer.model.source import Source, resolve
from veneer.model.sources import checkpoint_files
from veneer.model.swap import linear_paths

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files: where they are, its config, and its tensors by their stored names."""

    source: Source
    config: Any
    shards: Shards


@dataclass(frozen=True)
class Pair:
    """Base and tuned model, of the same tensors.

    linear: paths of the linear layers but the vocabulary head. transposed: whether these are stored as (I, O). others:
    names of all other parameters, each once where it is tied. names: parameter -> its names in the two checkpoints.
    """

    base: Checkpoint
    tuned: Checkpoint
    linear: list[str]
    transposed: bool
    others: list[str]
    names: dict[str, tuple[str, str]]

    def read(self, parameter: str) -> tuple[Tensor, Tensor]:
        """The parameter in the base and in the tuned model, as stored. Raises ModelError for anything but floats."""
        base, tuned = self.names[parameter]
        found = self.base.shards.read(base), self.tuned.shards.read(tuned)
        for tensor, checkpoint in zip(found, (self.base, self.tuned), strict=True):
            if tensor.dtype not in FLOATS:
                raise ModelError(
                    f"{parameter} of {checkpoint.source.name} is stored as {str(tensor.dtype).removeprefix('torch.')}; "
                    "read are float32, bfloat16 and float16. Next: name the original model"
                )
        return found


def open_pair(base: str, tuned: str) -> Pair:
    """Raises ModelError, before a weight is read: for a quantised model, for another architecture, for tensors that
    are missing or have another shape; each with all differences."""
    with quiet():
        one, other = _open(base), _open(tuned)
        model = read_shapes(one.source)
    _check_architecture(one, other)
    linear = linear_paths(model)
    weights = {f"{path}.weight" for path in linear}
    parameters = [name for name, _ in model.named_parameters()]
    names = _names(parameters, model.base_model_prefix, one, other)
    transposed = any(isinstance(model.get_submodule(path), Conv1D) for path in linear)
    _check_kinds(model, linear)
    return Pair(one, other, linear, transposed, [name for name in parameters if name not in weights], names)


def _open(name: str) -> Checkpoint:
    source = opened(resolve(name))
    if source.gguf_file:
        raise ModelError(f"{name} is a quantised model (GGUF): no difference of weights. Next: name the original model")
    config = read_config(source)
    if stored := bnb.stored_as(name, getattr(config, "quantization_config", None)):
        raise ModelError(f"{name} is quantised ({stored}): no difference of weights. Next: name the original model")
    files = checkpoint_files(source.place)
    if not files:
        where = f"hf download {name}" if source.local is None else "save the model as safetensors"
        raise ModelError(f"no safetensors files of {name} on this machine. Next: {where}")
    return Checkpoint(source, config, Shards(files))


def _check_architecture(base: Checkpoint, tuned: Checkpoint) -> None:
    one, other = settings_of(base.config), settings_of(tuned.config)
    differ = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
    faults = [f"{key}: base {one.get(key)}, tuned {other.get(key)}" for key in differ]
    if faults:
        headline = f"{tuned.source.name} is of another architecture than {base.source.name}:"
        raise ModelError(listed(headline, faults, "Name the model that it was tuned from as --base-model."))


def _check_kinds(model: nn.Module, linear: Sequence[str]) -> None:
    """A family's own kind of linear layer may do more than multiply by its weight."""
    odd = [path for path in linear if type(model.get_submodule(path)) not in (nn.Linear, Conv1D)]
    if odd:
        kind = type(model.get_submodule(odd[0])).__name__
        raise ModelError(f"{odd[0]} is a {kind}; an adapter goes on a plain linear layer")


def _names(parameters: Sequence[str], prefix: str, base: Checkpoint, tuned: Checkpoint) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    faults: list[str] = []
    lacking: dict[str, list[str]] = {base.source.name: [], tuned.source.name: []}
    for parameter in parameters:
        pair = [checkpoint.shards.name_of(parameter, prefix) for checkpoint in (base, tuned)]
        for checkpoint, name in zip((base, tuned), pair, strict=True):
            if name is None:
                lacking[checkpoint.source.name].append(parameter)
        if pair[0] is not None and pair[1] is not None:
            found[parameter] = (pair[0], pair[1])
    for name, missing in lacking.items():
        add_fault(faults, f"not in the files of {name} under this name (experts are not extracted)", missing, 3)
    shapes = {p: (base.shards.shape_of[one], tuned.shards.shape_of[other]) for p, (one, other) in found.items()}
    odd = [f"{p} (base {list(one)}, tuned {list(other)})" for p, (one, other) in shapes.items() if one != other]
    add_fault(faults, "other shapes", odd, 3)
    if faults:
        raise ModelError(listed("the two models do not hold the same tensors:", faults))
    return found
