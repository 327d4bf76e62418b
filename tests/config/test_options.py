"""The table of options that help and parser read."""

from __future__ import annotations

from veneer.config import EvalSettings, GenerateSettings, RunConfig, options_of


def test_kind_and_metavar_follow_the_type() -> None:
    options = options_of(RunConfig)
    described = {name: (options[name].kind, options[name].metavar) for name in options}
    assert described["r"] == ("int", "N")
    assert described["scale"] == ("float", "X")
    assert described["use_rslora"] == ("flag", "")
    assert described["max_steps"] == ("int", "N")
    assert described["eval_dataset"] == ("str", "FILE")
    assert described["lr_scheduler_type"] == ("str", "linear|cosine|constant")
    assert described["target_modules"] == ("list", "all-linear|A,B,...")
    assert described["rank_pattern"] == ("dict", "MODULE=N,...")


def test_sections_are_opened_and_groups_named() -> None:
    options = options_of(RunConfig)
    assert options["r"].path == ("lora", "r")
    assert options["base_model"].path == ("base_model",)
    assert {"lora", "data", "train"}.isdisjoint(options)
    assert [options[name].group for name in ("base_model", "dtype", "dataset", "r", "seed")] == [
        "Run",
        "Storage of the base",
        "Data",
        "Low-rank update",
        "Training",
    ]


def test_shared_options_stay_in_the_group_that_declares_them() -> None:
    assert options_of(EvalSettings)["base_model"].group == "Base model"
    assert options_of(GenerateSettings)["top_p"].group == "Decoding"


def test_one_word_is_an_alias_here_and_an_option_there() -> None:
    assert "batch_size" in options_of(RunConfig)["per_device_train_batch_size"].aliases
    assert "batch_size" in options_of(EvalSettings)
