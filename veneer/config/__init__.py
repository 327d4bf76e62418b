"""Typed settings, free of torch <-> YAML <-> command line; one home per option.

    RunConfig(base_model="smollm2", output_dir="out", data=DataSettings(dataset="train.jsonl"))
    RunConfig.from_flat({"model": "smollm2", "dataset": "train.jsonl", "output_dir": "out", "lora_rank": 8})

An option is a field: its name, type, limits, default and help text stand there and nowhere else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.config.adapters import ConvertSettings, MergeSettings, read_recipe
    from veneer.config.aliases import ADVICE, ALIASES, SHORTHANDS
    from veneer.config.data import DataSettings
    from veneer.config.files import dump_yaml, read_yaml, write_yaml
    from veneer.config.options import Option, options_of
    from veneer.config.run import HubSettings, LoraSettings, ReportingSettings, RunConfig, TrainSettings
    from veneer.config.settings import Settings, read
    from veneer.config.storage import SWITCHES, StorageSettings
    from veneer.config.verbs import (
        BaseSettings,
        ChatSettings,
        DecodingSettings,
        DemoSettings,
        EvalSettings,
        GenerateSettings,
        InspectSettings,
        PreviewSettings,
        PushSettings,
    )

__all__ = [
    "ADVICE",
    "ALIASES",
    "SHORTHANDS",
    "SWITCHES",
    "BaseSettings",
    "ChatSettings",
    "ConvertSettings",
    "DataSettings",
    "DecodingSettings",
    "DemoSettings",
    "EvalSettings",
    "GenerateSettings",
    "HubSettings",
    "InspectSettings",
    "LoraSettings",
    "MergeSettings",
    "Option",
    "PreviewSettings",
    "PushSettings",
    "ReportingSettings",
    "RunConfig",
    "Settings",
    "StorageSettings",
    "TrainSettings",
    "dump_yaml",
    "options_of",
    "read",
    "read_recipe",
    "read_yaml",
    "write_yaml",
]

_HOMES = {
    "adapters": "ConvertSettings MergeSettings read_recipe",
    "aliases": "ADVICE ALIASES SHORTHANDS",
    "files": "dump_yaml read_yaml write_yaml",
    "options": "Option options_of",
    "data": "DataSettings",
    "run": "HubSettings LoraSettings ReportingSettings RunConfig TrainSettings",
    "settings": "Settings read",
    "storage": "SWITCHES StorageSettings",
    "verbs": "BaseSettings ChatSettings DecodingSettings DemoSettings EvalSettings GenerateSettings InspectSettings "
    "PreviewSettings PushSettings",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    # On first use: `--help` of one verb then builds the settings of one verb, which keeps it under half a second.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"veneer.config.{_HOME[name]}"), name)
