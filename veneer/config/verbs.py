"""The settings of the verbs other than `train`: each option once, shared ones in a class of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.data import ColumnSettings, RowSettings
from veneer.config.run import HubNameSettings
from veneer.config.settings import Settings
from veneer.config.storage import StorageSettings
from veneer.config.values import (
    MAX_LENGTH,
    File,
    FilesInOrder,
    Folder,
    Folders,
    Length,
    Metavar,
    ModelName,
    Names,
    Positive,
    Seed,
    Text,
    split_dict,
)

MOST_WITH_DATA = 8  # adapters: each file is read by each adapter alone, and by its own with each other, twice
Target = Literal["peft", "vllm", "sglang", "llama.cpp"]


def _named(value: Any) -> Any:
    """`a=out/a,out/b` -> {"a": "out/a", "b": "out/b"}: a folder alone is called by its last part."""
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return split_dict(value)
    items = [item.strip() for item in value.split(",") if item.strip()]
    pairs = [item.split("=", 1) if "=" in item else [_name(item), item] for item in items]
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PydanticCustomError("twice", "one adapter a name ({names} twice)", {"names": ", ".join(twice)})
    return dict(pairs)


def _name(folder: str) -> str:
    return re.sub(r"\W", "_", Path(folder).resolve().name)


def _slots(folders: dict[str, str]) -> dict[str, str]:
    bad = [name for name in folders if name == "base" or not re.fullmatch(r"\w[\w-]*", name)]
    if bad:
        raise PydanticCustomError(
            "slots", "names of letters, digits, _ and -, other than 'base' (not {bad})", {"bad": ", ".join(bad)}
        )
    return folders


NamedFolders = Annotated[
    dict[str, Folder], BeforeValidator(_named), AfterValidator(_slots), Metavar("[NAME=]FOLDER,...")
]


class BaseSettings(StorageSettings):
    """Which base model, stored how."""

    group: ClassVar[str] = "Base model"

    base_model: ModelName | None = Field(
        default=None, description="hub id, local folder, GGUF file, or smollm2; default: the one the adapter names"
    )

    def _need_model(self, adapter: Any) -> None:
        if self.base_model is None and not adapter:
            raise PydanticCustomError("no_model", "no model: give `base_model`, an adapter, or both")


class DecodingSettings(Settings):
    """How text is produced from the model."""

    group: ClassVar[str] = "Decoding"

    max_new_tokens: Positive = Field(default=256, description="longest answer in tokens")
    temperature: float = Field(default=0.0, ge=0, description="0: always the likeliest token; above: sampled")
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample from the likeliest tokens of this probability")
    seed: Seed = Field(default=0, description="of the sampling")


class EvalSettings(BaseSettings, RowSettings):
    """Base and adapters on one data file."""

    group: ClassVar[str] = "Evaluation"

    dataset: File | None = Field(default=None, description="rows to evaluate on, a data file as for train")
    adapter: Folders = Field(default=[], description="adapter folders; none: the base alone")
    metrics: Annotated[Names, Field(min_length=1)] = Field(
        default=["loss", "perplexity", "exact_match"],
        description="what to measure: loss, perplexity, token_accuracy; exact_match, accuracy, bleu, chrf, rouge1, "
        "rouge2, rouge_l; choice_accuracy, choice_accuracy_norm (rows with `choices`); or file.py:function of your own",
    )
    system_prompt: Text | None = Field(
        default=None, description="put before every conversation that has none; default: as the adapters were trained"
    )
    max_new_tokens: Positive = Field(default=128, description="longest answer in tokens")
    batch_size: Positive = Field(default=16, description="rows generated together")
    limit: Positive | None = Field(default=None, description="only the first N rows")
    seed: Seed = Field(default=0, description="of the bootstrap intervals")
    output: File | None = Field(
        default=None, description="write the whole result, examples too, to this JSON file; the table alone to a .md"
    )
    harness: Names = Field(
        default=[],
        description="instead of `dataset`, tasks of lm-evaluation-harness (pip install lm-eval): names or YAML files",
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="solved examples before each question of `harness`; default: as the task has it"
    )
    apply_chat_template: bool = Field(default=False, description="ask the questions of `harness` as a chat")

    @model_validator(mode="after")
    def _complete(self) -> EvalSettings:
        self._need_model(self.adapter)
        if (self.dataset is None) == (not self.harness):
            raise PydanticCustomError("input", "give either `dataset` or `harness`")
        given = self.model_fields_set
        if self.harness and (idle := sorted({"metrics", "max_new_tokens", "max_length"} & given)):
            raise PydanticCustomError(
                "harness",
                "tasks of `harness` say for themselves what {idle} is; leave it out",
                {"idle": " and ".join(idle)},
            )
        if not self.harness and (idle := sorted({"num_fewshot", "apply_chat_template"} & given)):
            raise PydanticCustomError("alone", "{idle} is for `harness` only", {"idle": " and ".join(idle)})
        if self.system_prompt is not None and self.harness and not self.apply_chat_template:
            raise PydanticCustomError("system", "`system_prompt` needs `apply_chat_template` beside `harness`")
        return self


class GenerateSettings(DecodingSettings, BaseSettings, ColumnSettings):
    """Text from the base or an adapter."""

    group: ClassVar[str] = "Input"

    prompt: Text | None = Field(default=None, description="what the user says; - reads standard input")
    dataset: File | None = Field(default=None, description="answer every row of a data file instead")
    limit: Positive | None = Field(default=None, description="only the first N rows of the dataset")
    adapter: Folder | None = Field(default=None, description="adapter folder; default: the base alone")
    system_prompt: Text | None = Field(
        default=None, description="put before every conversation that has none; default: as the adapter was trained"
    )
    num_return_sequences: Positive = Field(default=1, description="answers to a prompt")
    batch_size: Positive = Field(default=16, description="prompts answered together")

    @model_validator(mode="after")
    def _complete(self) -> GenerateSettings:
        self._need_model(self.adapter)
        if (self.prompt is None) == (self.dataset is None):
            raise PydanticCustomError("input", "give either `prompt` or `dataset`")
        if self.num_return_sequences > 1 and self.temperature == 0:
            raise PydanticCustomError("same", "`num_return_sequences` above 1 needs a `temperature` above 0")
        return self


class ChatSettings(DecodingSettings, BaseSettings):
    """A conversation, with adapters to switch between."""

    group: ClassVar[str] = "Conversation"

    adapters: NamedFolders = Field(
        default={}, description="adapters to switch between, each under a name; the first speaks first"
    )
    system_prompt: Text | None = Field(
        default=None, description="put before the conversation; default: as each adapter was trained"
    )

    @model_validator(mode="after")
    def _complete(self) -> ChatSettings:
        self._need_model(self.adapters)
        return self


class PreviewSettings(ColumnSettings):
    """What the model will see of a data file."""

    group: ClassVar[str] = "Preview"

    dataset: File = Field(description="rows to look at, a data file as for train")
    base_model: ModelName = Field(
        description="whose tokenizer and chat template: hub id, folder, GGUF file, or smollm2"
    )
    n: int = Field(default=3, ge=0, description="rows to show")
    max_length: Length = Field(
        default=MAX_LENGTH, description="longest row in tokens; what is beyond is cut and counted"
    )
    system_prompt: Text | None = Field(default=None, description="put before every conversation that has none")
    add_tokens: Names = Field(default=[], description="words that become tokens, as for train")


class InspectSettings(BaseSettings, RowSettings):
    """What adapters are, alone and beside each other."""

    group: ClassVar[str] = "Inspection"

    base_model: ModelName | None = Field(
        default=None, description="also measure on this base: hub id, local folder, GGUF file, or smollm2"
    )
    adapters: Annotated[Folders, Field(min_length=1)] = Field(description="adapter folders")
    target: Target | None = Field(
        default=None, description="would this server load them, and why not (exit code 2 where it would not)"
    )
    rank: Positive | None = Field(
        default=None,
        description="tell what is kept at this rank, and take the target to be started for it; default: the largest "
        "of the adapters, and what the target allows unasked",
    )
    dataset: FilesInOrder = Field(
        default=[],
        description="a data file for each adapter, in their order: what the others do to it, on `base_model`",
    )
    limit: Positive | None = Field(default=None, description="only the first N rows of each data file")
    seed: Seed = Field(default=0, description="of the bootstrap intervals of losses")
    output: File | None = Field(default=None, description="write a page with heat maps to this .html file")

    @model_validator(mode="after")
    def _complete(self) -> InspectSettings:
        if self.output is not None and Path(self.output).suffix.lower() not in (".html", ".htm"):
            raise PydanticCustomError("page", "`output` is a page: name a .html file; for the figures there is --json")
        if self.base_model is None and (idle := self.storage_options()):
            raise PydanticCustomError(
                "storage",
                "{options} says how `base_model` is stored; give one",
                {"options": " and ".join(f"`{name}`" for name in idle)},
            )
        self._check_data()
        return self

    def _check_data(self) -> None:
        files, adapters = len(self.dataset), len(self.adapters)
        if not files and (idle := sorted({"columns", "limit", "max_length", "seed"} & self.model_fields_set)):
            told = {"idle": " and ".join(f"`{name}`" for name in idle), "verb": "is" if len(idle) == 1 else "are"}
            raise PydanticCustomError("idle", "{idle} {verb} for `dataset`; give a data file for each adapter", told)
        if files and files != adapters:
            told = {"files": str(files), "adapters": str(adapters)}
            raise PydanticCustomError(
                "counts", "`dataset` wants a file for each adapter, in their order: {adapters}, got {files}", told
            )
        if files and self.base_model is None:
            raise PydanticCustomError("model", "`dataset` is measured on a base model; give `base_model`")
        if files and not 2 <= adapters <= MOST_WITH_DATA:
            told = {"most": str(MOST_WITH_DATA), "adapters": str(adapters)}
            raise PydanticCustomError(
                "several", "`dataset` is for 2 to {most} adapters beside each other, got {adapters}; of one: eval", told
            )


class PushSettings(HubNameSettings):
    """An adapter goes to the Hugging Face Hub."""

    adapter: Folder = Field(description="adapter folder")


class DemoSettings(Settings):
    """The demo: everything else is fixed."""

    group: ClassVar[str] = "Demo"

    output_dir: Folder = Field(default="out/demo", description="folder for data, adapter, merged model and report")
    max_steps: Positive = Field(default=90, description="optimiser steps of 12 rows")
    test_rows: Positive = Field(default=100, description="held-out requests to evaluate on")
    seed: Seed = Field(default=0, description="of data, start and order")
