"""How values written as text are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.config import ChatSettings, DataSettings, LoraSettings, RunConfig, TrainSettings
from veneer.config.values import LONGEST_ROW, split_dict, split_files, split_list
from veneer.errors import ConfigError

WORDS = st.from_regex(r"[a-z_.]{1,8}", fullmatch=True)
GIVEN = {"base_model": "m", "output_dir": "o", "dataset": "d"}


@given(st.lists(WORDS))
def test_a_list_is_its_parts_between_commas(words: list[str]) -> None:
    assert split_list(",".join(words)) == words
    assert split_list(", ".join(words)) == words


def test_what_exists_under_its_whole_name_is_one_file(tmp_path: Path) -> None:
    odd = tmp_path / "a,b.jsonl"
    options = {**GIVEN, "dataset": str(odd)}
    assert RunConfig.from_flat(options).data.datasets == [str(tmp_path / "a"), "b.jsonl"]
    odd.touch()
    assert RunConfig.from_flat(options).data.datasets == [str(odd)]
    pinned = f"{odd}@sha256:{'0' * 64}"
    assert split_files(pinned) == [pinned]


def test_no_row_is_longer_than_an_adapter_can_say() -> None:
    assert RunConfig.from_flat({**GIVEN, "max_length": LONGEST_ROW}).data.max_length == LONGEST_ROW
    with pytest.raises(ConfigError, match="max_length"):
        RunConfig.from_flat({**GIVEN, "max_length": LONGEST_ROW + 1})


@given(st.dictionaries(WORDS, st.integers(1, 99)))
def test_a_dictionary_is_pairs_between_commas(ranks: dict[str, int]) -> None:
    text = ",".join(f"{name}={rank}" for name, rank in ranks.items())
    assert LoraSettings(rank_pattern=split_dict(text)).rank_pattern == ranks


def test_lists_and_dictionaries_in_json() -> None:
    assert split_list('["a,b", "c"]') == ["a,b", "c"]
    assert split_dict('{"a=b": 1}') == {"a=b": 1}


def test_a_key_may_hold_an_equals_sign() -> None:
    assert split_dict("(?=q)x=4") == {"(?=q)x": "4"}


@pytest.mark.parametrize("text", ["q", "=3", "q=", "q=1,v"])
def test_a_pair_needs_both_sides(text: str) -> None:
    with pytest.raises(ConfigError, match="name=value"):
        RunConfig.from_flat({**GIVEN, "rank_pattern": text})


@pytest.mark.parametrize(("option", "text", "kind"), [("target_modules", "[q", "list"), ("rank_pattern", "{q", "dict")])
def test_broken_json_says_so(option: str, text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}.*{kind} in JSON"):
        RunConfig.from_flat({**GIVEN, option: text})


def test_targets_are_a_word_or_names() -> None:
    assert LoraSettings().target_modules == "all-linear"
    assert LoraSettings(target_modules="all-linear").target_modules == "all-linear"
    assert LoraSettings(target_modules="q_proj,v_proj").target_modules == ["q_proj", "v_proj"]
    assert LoraSettings(target_modules=["q_proj"]).target_modules == ["q_proj"]


@pytest.mark.parametrize(("given", "kept"), [("0.05", 0.05), (0, 0), ("100", 100), (7.0, 7), (1, 1), ("1e-2", 0.01)])
def test_validation_split_is_a_fraction_or_a_number_of_rows(given: object, kept: float) -> None:
    split = DataSettings(dataset="d", validation_split=given).validation_split
    assert split == kept
    assert isinstance(split, int if kept >= 1 else float)


@pytest.mark.parametrize("given", [1.5, -0.1, -1, "nan"])
def test_validation_split_out_of_range(given: object) -> None:
    with pytest.raises(ConfigError, match="validation_split"):
        DataSettings(dataset="d", validation_split=given)


@pytest.mark.parametrize(("given", "kept"), [("bf16", "bfloat16"), ("torch.float32", "float32"), ("auto", "auto")])
def test_dtype_names(given: str, kept: str) -> None:
    assert RunConfig.from_flat({**GIVEN, "dtype": given}).dtype == kept


@pytest.mark.parametrize("word", ["none", "None", "null", None])
def test_none_takes_an_option_back(word: str | None) -> None:
    assert TrainSettings(save_total_limit=word, max_steps=word).save_total_limit is None


def test_none_is_no_value_where_one_is_needed() -> None:
    with pytest.raises(ConfigError, match="r: got none, wanted a whole number"):
        LoraSettings(r="none")


def test_learning_rate_auto_and_no_step_limit() -> None:
    assert TrainSettings(learning_rate="auto", max_steps=-1) == TrainSettings()


def test_true_is_not_one() -> None:
    with pytest.raises(ConfigError, match="r: got True, wanted a number"):
        LoraSettings(r=True)


def test_adapters_have_names_or_lend_those_of_their_folders() -> None:
    settings = ChatSettings(adapters="polite=out/a=b,out/n2w,out/v1.5/")
    assert settings.adapters == {"polite": "out/a=b", "n2w": "out/n2w", "v1_5": "out/v1.5/"}


@pytest.mark.parametrize("text", ["base=out/a", "a.b=out/a", "out/a,other/a"])
def test_adapter_names_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="adapters"):
        ChatSettings(adapters=text)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({"fp16": True}, "float16"),
        ({"bf16": "true"}, "bfloat16"),
        ({"bf16": False, "fp16": True}, "float16"),
        ({"bf16": False}, "auto"),
        ({"bf16": "auto"}, "auto"),
    ],
)
def test_switches_of_other_tools_stand_for_a_dtype(given: dict[str, object], dtype: str) -> None:
    assert RunConfig.from_flat({**GIVEN, **given}).dtype == dtype


@pytest.mark.parametrize("given", [{"fp16": True, "bf16": True}, {"fp16": True, "dtype": "float32"}, {"fp16": "maybe"}])
def test_two_dtypes_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        RunConfig.from_flat({**GIVEN, **given})
