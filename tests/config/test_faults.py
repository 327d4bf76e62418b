"""Sentences about options that are unknown, elsewhere, or wrong inside."""

from __future__ import annotations

import pytest

from veneer.config import ADVICE, MergeSettings, RunConfig, options_of
from veneer.config.faults import shown, unknown
from veneer.errors import ConfigError

GIVEN = {"base_model": "m", "dataset": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lerning_rate", "learning_rate"),
        ("datset", "dataset"),
        ("lora_ranks", "r"),
        ("target_module", "target_modules"),
        ("warmup", "warmup_ratio or warmup_steps"),
        ("resme", "resume"),
    ],
)
def test_the_nearest_option_is_named(typed: str, meant: str) -> None:
    assert unknown(RunConfig, typed, str, ["resume"]) == f"unknown option {typed}; did you mean {meant}?"


def test_nothing_near_nothing_named() -> None:
    assert unknown(RunConfig, "zzzzzz", str) == "unknown option zzzzzz"


def test_options_of_other_tools_are_answered_with_advice() -> None:
    with pytest.raises(ConfigError, match="packing: sequences are always packed"):
        RunConfig.from_flat({**GIVEN, "packing": True})
    assert "--load-in-4bit" in unknown(RunConfig, "quantization_bit", lambda name: "--" + name.replace("_", "-"))
    assert not set(ADVICE) & {s for o in options_of(RunConfig).values() for s in (o.name, *o.aliases)}


def test_a_section_is_not_an_option() -> None:
    with pytest.raises(ConfigError, match=r"lora is a group of options.*: method, r, lora_alpha"):
        RunConfig.from_flat({**GIVEN, "lora": {"r": 8}})


def test_a_list_that_is_too_short_is_told_in_our_words() -> None:
    with pytest.raises(ConfigError, match=r"adapters: got \[\], wanted at least 1 item$"):
        MergeSettings.from_flat({"adapters": [], "output": "out"})


def test_what_was_taken_for_an_adapter_is_shown() -> None:
    given = {"adapters": ["a", "b", "exact_match"], "output": "out", "dataset": ["a.jsonl", "b.jsonl"]}
    with pytest.raises(ConfigError, match=r"got 2 for 3 adapters \(a, b, exact_match\); give one for each"):
        MergeSettings.from_flat(given)


def test_the_place_inside_a_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern\[q_proj\]: got 0, wanted a value greater"):
        RunConfig.from_flat({**GIVEN, "rank_pattern": {"q_proj": 0, "v_proj": 4}})


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("Frage=prompt,Antwort=completion", r"wanted prompt=Frage,completion=Antwort: the name that veneer knows"),
        ("Frage=text,text=Frage", r"columns\[Frage\]"),
        ("prompt=text", None),  # a column may be called like one of ours
    ],
)
def test_columns_the_other_way_round(typed: str, told: str | None) -> None:
    if told is None:
        assert RunConfig.from_flat({**GIVEN, "columns": typed}).data.columns == {"prompt": "text"}
        return
    with pytest.raises(ConfigError, match=told):
        RunConfig.from_flat({**GIVEN, "columns": typed})


def test_the_branches_of_a_union_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"target_modules: got 3, wanted 'all-linear' or a list$"):
        RunConfig.from_flat({**GIVEN, "target_modules": 3})


@pytest.mark.parametrize("option", ["eval_steps", "early_stopping_patience"])
def test_validation_without_validation_rows(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} without validation rows; give eval_dataset or validation_split"):
        RunConfig.from_flat({**GIVEN, option: 2, "validation_split": 0})
    assert RunConfig.from_flat({**GIVEN, option: 2, "validation_split": 0, "eval_dataset": "e"})


def test_values_are_shown_short_and_bare() -> None:
    assert [shown(v) for v in ("abc", "", "a b", " a", 3, None)] == ["abc", "''", "a b", "' a'", "3", "None"]
    assert len(shown("x" * 500)) == 80
