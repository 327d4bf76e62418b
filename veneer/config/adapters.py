"""The settings of the verbs that make an adapter, or a model, out of adapters: merge and convert."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.data import RowSettings
from veneer.config.files import read_yaml
from veneer.config.merging import OPTIONS, SETTINGS, CutSettings, MethodOptions, data_methods, methods_with, spelt
from veneer.config.options import options_of
from veneer.config.values import (
    FilesInOrder,
    Folder,
    Folders,
    Metavar,
    ModelName,
    Names,
    Positive,
    Weights,
    split_files,
)
from veneer.config.verbs import BaseSettings
from veneer.errors import nearest


def _known(method: str) -> str:
    if method not in SETTINGS:
        alike = nearest(method, SETTINGS)
        told = {"alike": f"{' or '.join(alike)}; " if alike else "", "all": ", ".join(SETTINGS)}
        raise PydanticCustomError("method", "{alike}one of {all}", told)
    return method


_FEW = 5  # adapters told one by one
_OF_BASE = ("format", "force")
Method = Annotated[str, AfterValidator(_known), Metavar("METHOD")]
OF_DATA = ("metrics", "limit", "columns", "max_length")


class MergeSettings(MethodOptions, BaseSettings, RowSettings):
    """Several adapters become one, or one a part of its base."""

    group: ClassVar[str] = "Merge"

    adapters: Annotated[Folders, Field(min_length=1)] = Field(
        description="adapter folders; FOLDER@sha256:IDENTITY is an error where the folder holds another one"
    )
    method: Method = Field(
        default="linear",
        description=f"how several become one: {', '.join(SETTINGS)}; with `dataset`: {', '.join(data_methods())}",
    )
    weights: Weights | None = Field(
        default=None, description="one for each adapter, negative to take away; default: equal, 1 in all"
    )
    dataset: FilesInOrder = Field(
        default=[],
        description="a data file for each adapter, in their order, as for eval: the result is compared on each with "
        "the adapters and the base; methods that read data get every other row, and the report the rest",
    )
    metrics: Annotated[Names, Field(min_length=1)] = Field(
        default=["loss"], description="what the comparison on `dataset` measures, as for eval"
    )
    limit: Positive | None = Field(default=None, description="only the first N rows of each file of `dataset`")
    into_base: bool = Field(default=False, description="instead, add one adapter to the weights of its base")
    format: Literal["transformers", "gguf"] = Field(
        default="transformers",
        description="of the model of `into_base`: a folder for transformers, or a file for llama.cpp and Ollama",
    )
    force: bool = Field(
        default=False, description="`into_base` with `load_in_4bit`: write it in 4 bits, which few updates survive"
    )
    output: Folder = Field(description="folder for the merged adapter or model; must be new or empty")

    def method_options(self) -> dict[str, Any]:
        """The options of the method that were given."""
        return {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _complete(self) -> MergeSettings:
        faults = self._into_base_faults() if self.into_base else self._faults()
        if faults:
            raise PydanticCustomError("merge", "{faults}", {"faults": "; ".join(faults)})
        return self

    def _into_base_faults(self) -> list[str]:
        of_several = ("method", "weights", "dataset", *OF_DATA)
        idle = [name for name in of_several if name in self.model_fields_set] + list(self.method_options())
        faults = [f"{_listed(idle)}: of several adapters; leave out beside `into_base`"] if idle else []
        if len(self.adapters) > 1:
            faults.append("one adapter is merged into the base at a time")
        if self.storage not in ("dense", "nf4", "nf4-dq"):
            options = _listed(self.storage_options())
            faults.append(f"the update is added to the dense weights, whatever it was trained on; leave {options} out")
        elif self.storage != "dense" and self.format == "gguf":
            faults.append("`load_in_4bit`: a GGUF is written dense; leave it out, and use llama.cpp's llama-quantize")
        if self.force and self.storage == "dense":
            faults.append("`force` is for `load_in_4bit`")
        return faults + _file_names(self.output, "" if self.format == "gguf" else "add `format` gguf")

    def _faults(self) -> list[str]:
        idle = [name for name in _OF_BASE if name in self.model_fields_set]
        faults = self._data_faults() + ([f"{_listed(idle)}: for `into_base` only"] if idle else [])
        faults += _file_names(self.output, "then veneer convert it `to` gguf")
        if len(self.adapters) == 1 and not self.model_fields_set & {"method", "weights"}:
            faults.append("one adapter alone: add `into_base`, or name more; to compress it: veneer convert IN OUT")
        if self.weights is not None and len(self.weights) != len(self.adapters):
            faults.append(f"`weights`: got {len(self.weights)} for {len(self.adapters)} adapters; give one for each")
        has = SETTINGS[self.method].model_fields
        strange = [name for name in self.method_options() if name not in has]
        return faults + [f"`{name}` is no option of {self.method}; of {spelt(methods_with(name))}" for name in strange]

    def _data_faults(self) -> list[str]:
        given = self.model_fields_set
        if self.dataset:
            wanted, got = len(self.adapters), len(self.dataset)
            which = f" ({', '.join(self.adapters)})" if wanted <= _FEW else ""
            return [] if got == wanted else [f"`dataset`: got {got} for {wanted} adapters{which}; give one for each"]
        base = [name for name in BaseSettings.model_fields if name in given]
        told = "for `into_base` or with `dataset` only; adapters are merged without their base"
        faults = [f"{_listed(base)}: {told}"] if base else []
        if SETTINGS[self.method].reads_data:
            faults.append(f"{self.method} reads data: give `dataset`, a file for each adapter")
        if getattr(self, "activation_aware", None):
            faults.append("`activation_aware` reads data: give `dataset`, a file for each adapter")
        idle = [name for name in OF_DATA if name in given]
        return faults + ([f"{_listed(idle)}: with `dataset` only"] if idle else [])


class ConvertSettings(CutSettings):
    """Any adapter becomes plain PEFT LoRA, and a tuned model an adapter."""

    group: ClassVar[str] = "Convert"

    adapter: Folder | None = Field(default=None, description="adapter folder to convert: the first word alone")
    output: Folder = Field(description="folder for the result, new or empty: the second word alone")
    to: Literal["peft", "gguf"] = Field(
        default="peft",
        description="plain LoRA of scale 1: a folder that PEFT loads, or a file for llama.cpp and Ollama",
    )
    extract: ModelName | None = Field(
        default=None, description="instead, the adapter nearest to what this tuned model changed: folder or hub id"
    )
    base_model: ModelName | None = Field(
        default=None, description="the model that it was tuned from; of an adapter `to` gguf, default: the one it names"
    )
    force: bool = Field(
        default=False, description="extract although norms, embeddings or biases changed too: what is lost is told"
    )

    @model_validator(mode="after")
    def _complete(self) -> ConvertSettings:
        faults = self._adapter_faults() if self.extract is None else self._extract_faults()
        if faults:
            raise PydanticCustomError("convert", "{faults}", {"faults": "; ".join(faults)})
        return self

    def _adapter_faults(self) -> list[str]:
        of_extract = ("force",) if self.to == "gguf" else ("base_model", "force")
        idle = [name for name in of_extract if name in self.model_fields_set]
        faults = [f"{_listed(idle)}: for `extract` only"] if idle else []
        faults += _file_names(self.output, "" if self.to == "gguf" else "add `to` gguf")
        return faults if self.adapter else [*faults, "nothing to convert: name an adapter folder, or give `extract`"]

    def _extract_faults(self) -> list[str]:
        faults = ["either an `adapter` to convert or a model to `extract` one from"] if self.adapter else []
        if self.to != "peft":
            faults.append("`extract` writes a PEFT folder; convert that `to` gguf")
        if self.base_model is None:
            faults.append("`extract` needs `base_model`: the model that the tuned one was made from")
        if self.rank is None and self.energy is None:
            faults.append("`extract` needs `rank`, or `energy`: how much of the difference to keep")
        return faults + _file_names(self.output, "then veneer convert it `to` gguf")


def _file_names(output: str, how: str) -> list[str]:
    """A fault where `output` is called like a file for llama.cpp; `how` one comes about, if not by what was asked."""
    folder, ending = os.path.splitext(output.rstrip("/"))
    if ending.lower() != ".gguf":
        return []
    return [f"`output` is a folder, in which a .gguf may lie: give {folder}{f'; {how}' if how else ''}"]


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options in a file for `veneer merge`; folders are relative to that of the file. Raises ConfigError."""
    options, folder = read_yaml(path), Path(path).parent
    known = {spelling: o for o in options_of(MergeSettings).values() for spelling in (*o.aliases, o.name)}
    for key, value in options.items():
        option = known.get(key.replace("-", "_"))
        if option and option.name == "output" and isinstance(value, str):
            options[key] = os.path.join(folder, value)
        elif option and option.name in ("adapters", "dataset"):
            found = split_files(value, str(folder))
            some = isinstance(found, list)
            options[key] = [_beside(folder, one) if isinstance(one, str) else one for one in found] if some else found
        elif option and option.name == "base_model" and str(value).startswith(("./", "../")):
            options[key] = os.path.join(folder, value)
    return options


def _beside(folder: Path, name: str) -> str:
    return name if name.startswith("hub:") else os.path.join(folder, name)


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
