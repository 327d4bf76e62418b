"""From flat options to settings and back; every fault in one message."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.config import ALIASES, DataSettings, LoraSettings, RunConfig, options_of
from veneer.config.adapters import ConvertSettings, MergeSettings
from veneer.config.verbs import ChatSettings, EvalSettings, GenerateSettings, PreviewSettings
from veneer.errors import ConfigError

ALL = [RunConfig, EvalSettings, GenerateSettings, ChatSettings, PreviewSettings, MergeSettings, ConvertSettings]
GIVEN: dict[str, Any] = {"base_model": "smollm2", "dataset": "train.jsonl", "output_dir": "out"}

positive = st.floats(1e-12, 1e6)
steps = st.none() | st.integers(1, 10**9)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "r": st.integers(1, 512),
        "lora_alpha": positive,
        "lora_dropout": st.floats(0, 1, exclude_max=True),
        "use_rslora": st.booleans(),
        "scale": st.none() | positive,
        "target_modules": st.just("all-linear") | st.lists(st.text(min_size=1)),
        "rank_pattern": st.dictionaries(st.text(), st.integers(1, 99)),
        "alpha_pattern": st.dictionaries(st.text(), positive),
        "learning_rate": st.none() | positive,
        "max_steps": steps,
        "save_steps": steps,
        "seed": st.integers(0, 2**63 - 1),
        "lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant"]),
        "system_prompt": st.none() | st.text().filter(lambda text: text.lower() not in ("none", "null")),
        "load_best_model_at_end": st.booleans(),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    },
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # thirteen options at once, on a busy machine
@given(OPTIONS)
def test_flat_options_survive_the_round_trip(options: dict[str, Any]) -> None:
    config = RunConfig.from_flat({**GIVEN, **options})
    flat = config.to_flat()
    assert {name: flat[name] for name in options} == options
    assert RunConfig.from_flat(flat) == config
    assert list(flat) == list(options_of(RunConfig))


def test_flat_options_reach_their_section() -> None:
    config = RunConfig.from_flat({**GIVEN, "r": "8", "max_length": 64, "learning_rate": "1e-4"})
    assert (config.lora.r, config.data.max_length, config.train.learning_rate) == (8, 64, 1e-4)
    assert config == RunConfig(
        base_model="smollm2",
        output_dir="out",
        data=DataSettings(dataset="train.jsonl", max_length=64),
        lora=LoraSettings(r=8),
        train=config.train,
    )


@pytest.mark.parametrize("verb", ALL)
def test_no_option_hides_another(verb: Any) -> None:
    """Section names are no options, every field is one, and no alias is an option or stands for two."""
    options = options_of(verb)
    spellings = [s for option in options.values() for s in (option.name, *option.aliases)]
    assert len(spellings) == len(set(spellings))
    assert all(option.help for option in options.values())


def test_every_alias_leads_to_an_option() -> None:
    known = {name for settings in ALL for name in options_of(settings)}
    assert {target for targets in ALIASES.values() for target in targets} <= known


@pytest.mark.parametrize(
    ("alias", "option", "value"),
    [
        ("model_name_or_path", "base_model", "x"),
        ("lora_r", "r", 4),
        ("lora_rank", "r", 4),
        ("rank", "r", 4),
        ("sequence_len", "max_length", 9),
        ("cutoff_len", "max_length", 9),
        ("max_seq_length", "max_length", 9),
        ("lora_target_modules", "target_modules", ["q"]),
        ("lr", "learning_rate", 0.5),
        ("epochs", "num_train_epochs", 2),
        ("batch_size", "per_device_train_batch_size", 2),
        ("lora-alpha", "lora_alpha", 8),
    ],
)
def test_other_spellings(alias: str, option: str, value: object) -> None:
    options = {name: v for name, v in GIVEN.items() if name != option}
    assert RunConfig.from_flat({**options, alias: value}).to_flat()[option] == value


def test_two_spellings_of_one_option_must_agree() -> None:
    assert RunConfig.from_flat({**GIVEN, "r": 8, "lora_r": 8}).lora.r == 8
    with pytest.raises(ConfigError, match="r is given twice: 8 and, as lora_r, 16"):
        RunConfig.from_flat({**GIVEN, "r": 8, "lora_r": 16})


def test_all_faults_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat({"r": 0, "learning_rate": math.nan, "lora_dropout": 1, "max_step": 3, "dataset": ""})
    message = str(caught.value)
    for part in (
        "r: got 0, wanted a value greater than or equal to 1",
        "learning_rate: got nan, wanted a finite number",
        "lora_dropout: got 1, wanted a value less than 1",
        "unknown option max_step; did you mean max_steps?",
        "base_model is missing: hub id",
        "output_dir is missing",
        "dataset: got ''",
    ):
        assert part in message
    assert len(message.splitlines()) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "inf", 0, -1e-4])
def test_learning_rate_is_finite_and_positive(value: object) -> None:
    with pytest.raises(ConfigError, match="learning_rate: got"):
        RunConfig.from_flat({**GIVEN, "learning_rate": value})


def test_python_callers_get_the_same_error_for_the_right_option() -> None:
    with pytest.raises(ConfigError, match=r"r: got 0.*\n.*|unknown option rang"):
        LoraSettings(r=0, rang=2)
    with pytest.raises(ConfigError, match="max_length: got 0"):
        RunConfig(base_model="m", output_dir="o", data={"dataset": "d", "max_length": 0})
    with pytest.raises(ConfigError, match="dataset is missing"):
        RunConfig(base_model="m", output_dir="o")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        LoraSettings().r = 3


def test_a_mapping_where_a_value_is_wanted_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"dtype: got \{'a': 1\}, wanted"):
        RunConfig.from_flat({**GIVEN, "dtype": {"a": 1}})


def test_a_fault_of_several_options_names_them() -> None:
    with pytest.raises(ConfigError, match="  - optimizer_in_bwd does not go with max_grad_norm"):
        RunConfig.from_flat({**GIVEN, "optimizer_in_bwd": True})
