"""Which storage the options stand for, and which of them contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.bases import BASES
from veneer.config import ChatSettings, EvalSettings, GenerateSettings, MergeSettings, RunConfig, StorageSettings
from veneer.errors import ConfigError

NAMED: dict[str, dict[str, Any]] = {
    "dense": {"dtype": "bf16"},
    "nf4": {"load_in_4bit": True},
    "nf4-dq": {"load_in_4bit": "true", "bnb_4bit_use_double_quant": True},
    "int4": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
    "int8": {"load_in_8bit": True},
    "int8-outlier": {"load_in_8bit": True, "llm_int8_outliers": True},
    "fp8": {"load_in_fp8": True},
}


@pytest.mark.parametrize("storage", NAMED)
def test_options_name_a_storage(storage: str) -> None:
    assert StorageSettings.from_flat(NAMED[storage]).storage == storage


def test_every_storage_has_its_options() -> None:
    assert set(BASES) <= set(NAMED)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "one storage: load_in_4bit or load_in_8bit"),
        ({"load_in_4bit": True, "load_in_fp8": True}, "one storage"),
        ({"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant without load_in_4bit"),
        ({"bnb_4bit_quant_type": "int4", "load_in_8bit": True}, "bnb_4bit_quant_type without load_in_4bit"),
        ({"llm_int8_outliers": True, "load_in_4bit": True}, "llm_int8_outliers without load_in_8bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4", "double_quant": True}, "is for bnb_4bit_quant_type nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "got fp4, wanted 'nf4' or 'int4'"),
        ({"quantization": "nf4"}, "write load_in_4bit"),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, "products are in dtype"),
        ({"bnb_4bit_quant_storage": "uint8"}, "leave it out"),
    ],
)
def test_contradictions_and_other_tools_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        StorageSettings.from_flat(options)


def test_other_spellings() -> None:
    options = {"load_4bit": True, "quant_type": "nf4", "double_quant": True}
    assert StorageSettings.from_flat(options).storage == "nf4-dq"


def test_every_verb_that_loads_a_base_has_them() -> None:
    given = {"base_model": "m", "dataset": "d", "prompt": "p", "output_dir": "o", "load_in_8bit": True}
    for settings, needs in ((RunConfig, "dataset output_dir"), (EvalSettings, "dataset"), (GenerateSettings, "prompt")):
        chosen = {name: given[name] for name in ["base_model", "load_in_8bit", *needs.split()]}
        assert settings.from_flat(chosen).storage == "int8"
    assert ChatSettings.from_flat({"base_model": "m", "load_in_4bit": True}).storage == "nf4"


def test_merging_is_into_dense_weights() -> None:
    with pytest.raises(ConfigError, match=r"dense weights.*leave load_in_8bit out"):
        MergeSettings.from_flat({"adapters": "a", "output": "o", "into_base": True, "load_in_8bit": True})
