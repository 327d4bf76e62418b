"""The settings of the verbs that make an adapter, or a model, out of adapters: merge and convert."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.files import read_yaml
from veneer.config.merging import OPTIONS, SETTINGS, CutSettings, MethodOptions, methods_with, spelt
from veneer.config.options import options_of
from veneer.config.values import Folder, Folders, Metavar, ModelName, Weights, split_list
from veneer.config.verbs import BaseSettings
from veneer.errors import nearest


def _known(method: str) -> str:
    if method not in SETTINGS:
        alike = nearest(method, SETTINGS)
        told = {"alike": f"{' or '.join(alike)}; " if alike else "", "all": ", ".join(SETTINGS)}
        raise PydanticCustomError("method", "{alike}one of {all}", told)
    return method


Method = Annotated[str, AfterValidator(_known), Metavar("METHOD")]


class MergeSettings(MethodOptions, BaseSettings):
    """Several adapters become one, or one a part of its base."""

    group: ClassVar[str] = "Merge"

    adapters: Annotated[Folders, Field(min_length=1)] = Field(
        description="adapter folders; FOLDER@sha256:IDENTITY is an error where the folder holds another one"
    )
    method: Method = Field(default="linear", description=f"how several become one: {', '.join(SETTINGS)}")
    weights: Weights | None = Field(
        default=None, description="one for each adapter, negative to take away; default: equal, 1 in all"
    )
    into_base: bool = Field(default=False, description="instead, add one adapter to the weights of its base")
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
        idle = [name for name in ("method", "weights") if name in self.model_fields_set] + list(self.method_options())
        faults = [f"{_listed(idle)}: of several adapters; leave out beside `into_base`"] if idle else []
        if len(self.adapters) > 1:
            faults.append("one adapter is merged into the base at a time")
        if self.storage != "dense":
            options = _listed(self.storage_options())
            faults.append(f"the update is added to the dense weights, whatever it was trained on; leave {options} out")
        return faults

    def _faults(self) -> list[str]:
        idle = [name for name in BaseSettings.model_fields if name in self.model_fields_set]
        faults = [f"{_listed(idle)}: for `into_base` only; adapters are merged without their base"] if idle else []
        if len(self.adapters) == 1 and not self.model_fields_set & {"method", "weights"}:
            faults.append("one adapter alone: add `into_base`, or name more; to compress it: veneer convert IN OUT")
        if self.weights is not None and len(self.weights) != len(self.adapters):
            faults.append(f"`weights`: got {len(self.weights)} for {len(self.adapters)} adapters; give one for each")
        has = SETTINGS[self.method].model_fields
        strange = [name for name in self.method_options() if name not in has]
        return faults + [f"`{name}` is no option of {self.method}; of {spelt(methods_with(name))}" for name in strange]


class ConvertSettings(CutSettings):
    """Any adapter becomes plain PEFT LoRA, and a tuned model an adapter."""

    group: ClassVar[str] = "Convert"

    adapter: Folder | None = Field(default=None, description="adapter folder to convert: the first word alone")
    output: Folder = Field(description="folder for the result, new or empty: the second word alone")
    to: Literal["peft"] = Field(default="peft", description="plain LoRA that PEFT loads, scale 1")
    extract: ModelName | None = Field(
        default=None, description="instead, the adapter nearest to what this tuned model changed: folder or hub id"
    )
    base_model: ModelName | None = Field(default=None, description="the model that it was tuned from")
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
        idle = [name for name in ("base_model", "force") if name in self.model_fields_set]
        faults = [f"{_listed(idle)}: for `extract` only"] if idle else []
        return faults if self.adapter else [*faults, "nothing to convert: name an adapter folder, or give `extract`"]

    def _extract_faults(self) -> list[str]:
        faults = ["either an `adapter` to convert or a model to `extract` one from"] if self.adapter else []
        if self.base_model is None:
            faults.append("`extract` needs `base_model`: the model that the tuned one was made from")
        if self.rank is None and self.energy is None:
            faults.append("`extract` needs `rank`, or `energy`: how much of the difference to keep")
        return faults


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options in a file for `veneer merge`; folders are relative to that of the file. Raises ConfigError."""
    options, folder = read_yaml(path), Path(path).parent
    known = {spelling: o for o in options_of(MergeSettings).values() for spelling in (*o.aliases, o.name)}
    for key, value in options.items():
        option = known.get(key.replace("-", "_"))
        if option and option.name == "output" and isinstance(value, str):
            options[key] = os.path.join(folder, value)
        elif option and option.name == "adapters" and isinstance(found := split_list(value), list):
            options[key] = [os.path.join(folder, one) if isinstance(one, str) else one for one in found]
    return options


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
