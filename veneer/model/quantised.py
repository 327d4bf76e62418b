"""Reads a model in a quantised storage, one tensor at a time: the dense model never exists as a whole.

On a GPU a tensor goes there as it is stored, is cast and encoded there, and its dense copy is freed before the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.bases import BASES
from veneer.bases.base import Base
from veneer.errors import ModelError
from veneer.model import bnb
from veneer.model.experts import experts_note
from veneer.model.progress import shown
from veneer.model.read import check_complete, forget_quantiser, from_pretrained, quiet, read_config, read_model
from veneer.model.saving import saves_as
from veneer.model.shards import Shards
from veneer.model.skeleton import Hollow, hollows, skeleton_config
from veneer.model.source import Source
from veneer.model.swap import linear_paths, place, place_leaf
from veneer.notes import tell


@dataclass(frozen=True)
class Way:
    """How linear layers are to be held. packed: the files hold them so already, and the others of them stay dense."""

    storage: str
    dtype: torch.dtype
    device: torch.device
    packed: bool = False
    twice: bool = False  # fp8: a second copy, transposed, for the backward product

    def __str__(self) -> str:
        return f"{self.storage} {str(self.dtype).removeprefix('torch.')}"


def storage_class(storage: str) -> type[Base]:
    """The class that the table BASES names; raises ModelError for a name that is not in it."""
    if storage not in BASES:
        raise ModelError(f"storage {storage!r}: wanted one of {', '.join(BASES)}")
    module, _, name = BASES[storage].partition(":")
    return getattr(import_module(module), name)


def check_way(way: Way) -> None:
    """Raises ModelError for an unknown storage, and for one that the device cannot compute in."""
    kind = storage_class(way.storage)
    if way.storage == "fp8" and not import_module(kind.__module__).fp8_supported(way.device):
        name = torch.cuda.get_device_name(way.device) if way.device.type == "cuda" else "the CPU"
        raise ModelError(
            f"fp8 needs a GPU that multiplies it (NVIDIA Ada, Hopper or newer); the device is {name}. "
            "Next: --load-in-8bit or --load-in-4bit"
        )


def read_quantised(source: Source, way: Way, progress: bool) -> PreTrainedModel:
    """The model with quantised leaves on the device, everything else dense on the CPU.

    Raises ModelError that lists missing and mismatched tensors before the first is encoded, and names the tensor and
    the file of one that cannot be.
    """
    if source.gguf_file:  # one too large to be unpacked: transformers knows its formats, and reads it whole
        with quiet():
            model = read_model(source, way.dtype)
        _check_layers(source, model, way)
        _encode(model, way, progress)
    else:
        model, told, files = _skeleton(source, way)
        _check_layers(source, model, way)
        shards = Shards(files)
        apart = _fill(source, model, shards, way, progress, told)
        check_complete(source, told, apart)
    saves_as(model, way.storage, way.dtype)
    return model.eval()


def _check_layers(source: Source, model: nn.Module, way: Way) -> None:
    """Says what stays dense; raises ModelError where that is every layer."""
    if experts := experts_note(model):
        tell(f"{source.name} as {way.storage}: {experts} and stay dense")
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise ModelError(
            f"{source.name} ({type(model).__name__}) holds its layers transposed (Conv1D), which veneer keeps dense "
            f"alone, and {way.storage} was asked for. Next: leave the storage option out"
        )


def _skeleton(source: Source, way: Way) -> tuple[PreTrainedModel, dict[str, Any], list[Path]]:
    with quiet():
        config = read_config(source)
        if way.packed:
            del config.quantization_config
        options = {"config": config, "quantization_config": skeleton_config(), "use_safetensors": True}
        model, told = from_pretrained(source, dtype=way.dtype, **options)
    files = model.hf_quantizer.files
    forget_quantiser(model)
    return model, told, files


def _fill(source: Source, model: nn.Module, shards: Shards, way: Way, progress: bool, told: dict[str, Any]) -> set[str]:
    """Puts a layer in every hollow place; returns the names that were read for it."""
    places = hollows(model)
    names = {path: shards.name_of(f"{path}.weight", model.base_model_prefix) for path in places}
    check_complete(source, _misfits(places, names, shards))
    weights = {path: name for path, name in names.items() if name is not None}
    if way.packed:
        bnb.check_packed(source.name, weights.values(), shards.file_of)
    made, way = {}, _room(way, sum(rows * columns for rows, columns in (hollow.shape for hollow in places.values())))
    by_file = sorted(weights, key=lambda path: str(shards.file_of[weights[path]]))
    for path in shown(by_file, f"reading {source.name} as {way.storage}", progress):
        made[path] = _layer(places[path], weights[path], shards, way)
    shards.close()
    for path in places:  # in the model's order, which the families of leaves follow
        _put(model, path, made.pop(path))
    parts = {(path, name): _parts(name, places[path], shards) for path, name in weights.items()}
    # Under the model's names too: transformers tells those of what it did not load, which files may spell otherwise.
    renamed = {f"{path}.{part[len(name) - len('weight') :]}" for (path, name), own in parts.items() for part in own}
    return renamed.union(*parts.values())


def _misfits(places: dict[str, Hollow], names: dict[str, str | None], shards: Shards) -> dict[str, list[str]]:
    """As transformers tells them: what the files lack, and what has another shape there."""
    missing = [f"{path}.weight" for path, name in names.items() if name is None]
    mismatched = []
    for path, name in names.items():
        hollow = places[path]
        if name is None:
            continue
        if hollow.biased and _bias(name) not in shards.file_of:
            missing.append(f"{path}.bias")
        if bnb.is_packed(name, shards.file_of):
            continue
        if shards.shape_of[name] != hollow.shape:
            mismatched.append(f"{name} (got {shards.shape_of[name]}, wanted {hollow.shape})")
    return {"missing_keys": missing, "mismatched_keys": mismatched}


def _layer(hollow: Hollow, name: str, shards: Shards, way: Way) -> nn.Module:
    """A base; a plain linear layer where packed files keep one dense."""
    bias = shards.read(_bias(name)).to(way.device).to(way.dtype) if hollow.biased else None
    if bnb.is_packed(name, shards.file_of):
        kind = storage_class(bnb.storage_of(name, shards.file_of))
        return bnb.read(name, shards, kind, hollow.shape, bias, dtype=way.dtype, device=way.device)
    weight = shards.read(name).to(way.device).to(way.dtype)
    if way.packed:
        return _plain(weight, bias)
    with _named(f"{name} in {shards.file_of[name]}"):
        return _stored(weight, bias, way)


def _encode(model: nn.Module, way: Way, progress: bool) -> None:
    """Encodes the linear layers of a dense model; each dense weight is freed before the next."""
    for path in shown(linear_paths(model), f"encoding as {way.storage}", progress):
        linear = model.get_submodule(path)
        weight, bias = linear.weight.detach().to(way.device), linear.bias
        linear.weight = None
        with _named(f"{path}.weight"):
            base = _stored(weight, None if bias is None else bias.to(way.device), way)
        place_leaf(model, path, base)


def _stored(weight: Tensor, bias: Tensor | None, way: Way) -> Base:
    base: Any = storage_class(way.storage).from_weight(weight, bias)
    if way.twice:
        base.add_transposed(weight)
    return base


def _room(way: Way, elements: int) -> Way:
    """Whether fp8 is kept twice: where both copies leave half of the GPU's free memory to training."""
    if way.storage != "fp8" or way.device.type != "cuda":
        return way
    return replace(way, twice=4 * elements <= torch.cuda.mem_get_info(way.device)[0])


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    if isinstance(layer, Base):
        place_leaf(model, path, layer)
    else:
        place(model, path, layer)


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


def _parts(weight: str, hollow: Hollow, shards: Shards) -> list[str]:
    """The names of all that was read for one layer."""
    bias = [_bias(weight)] if hollow.biased else []
    return bias + (bnb.parts_of(weight, shards.file_of) if bnb.is_packed(weight, shards.file_of) else [weight])


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Adds the tensor's name to what a storage says against its weight."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
