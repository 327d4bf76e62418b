"""From words to settings: spellings, flags, files, and every fault at once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.cli import chat, generate
from veneer.cli import eval as evaluation
from veneer.cli.parse import Parsed, parse
from veneer.cli.train import COMMAND
from veneer.config import EvalSettings, GenerateSettings, RunConfig
from veneer.errors import ConfigError

GIVEN = ["--base-model", "smollm2", "--dataset", "d.jsonl", "--output-dir", "out"]


def train(*words: str) -> Parsed[RunConfig]:
    return parse([*GIVEN, *words], COMMAND)


def flat(*words: str) -> dict[str, Any]:
    return train(*words).settings.to_flat()


@pytest.mark.parametrize(
    "words",
    [
        ["--max-steps", "7"],
        ["--max_steps", "7"],
        ["--max-steps=7"],
        ["--max_steps=7"],
        ["--steps", "7"],
        ["--iters=7"],
        ["--max-steps", "7", "--max_steps", "7"],
    ],
)
def test_one_option_many_spellings(words: list[str]) -> None:
    assert flat(*words) == flat() | {"max_steps": 7}


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["--dataset", "a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["--dataset", "a.jsonl,b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["--dataset", "a.jsonl", "--dataset=b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["--dataset", '["a,b.jsonl", "c.jsonl"]'], ["a,b.jsonl", "c.jsonl"]),
        (["--dataset", "a.jsonl"], "a.jsonl"),  # as older runs wrote it down
        (["--dataset", '["a,b.jsonl"]'], "a,b.jsonl"),
    ],
)
def test_several_data_sets(words: list[str], files: list[str] | str) -> None:
    found = parse([*GIVEN[:2], *GIVEN[4:], *words], COMMAND).settings.data
    assert found.dataset == files and found.datasets == ([files] if isinstance(files, str) else files)


def test_a_word_goes_on_with_a_list_and_with_nothing_else() -> None:
    assert flat("--target-modules", "q_proj", "v_proj")["target_modules"] == ["q_proj", "v_proj"]
    for words in (["--dataset", "d.jsonl", "--resume", "b.jsonl"], ["--max-steps", "3", "b.jsonl"]):
        with pytest.raises(ConfigError, match=r"b\.jsonl stands alone"):
            train(*words)


@pytest.mark.parametrize(
    ("words", "limits"),
    [([], [None] * 3), (["--limit", "5"], [5] * 3), (["--max-samples", "5,none,7"], [5, None, 7])],
)
def test_a_limit_for_all_data_sets_or_for_each(words: list[str], limits: list[int | None]) -> None:
    assert train("--dataset", "b.jsonl", "c.jsonl", *words).settings.data.limits == limits


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset-weights", "1,2,3"], "--dataset-weights has 3 for 2 data sets; wanted one for each"),
        (["--dataset-weights", "1", "--limit", "1,2,3"], "--dataset-weights has 1 and --limit has 3 for 2 data sets"),
        (["--dataset-weights", "1,0"], "--dataset-weights[1]: got 0, wanted a value greater than 0"),
        (["--limit", "0"], "--limit[0]: got 0"),
        (["--columns", "promt=Question"], "--columns"),
        (["--prompt-column", "Question"], "--prompt-column: write --columns prompt=NAME"),
        (["--dataset-text-field", "body"], "--dataset-text-field: write --columns text=NAME"),
    ],
)
def test_faults_of_data_options(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train("--dataset", "b.jsonl", *words)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "on"),
    [
        (["--use-rslora"], True),
        (["--use_rslora"], True),
        (["--rslora"], True),
        (["--use-rslora", "true"], True),
        (["--use-rslora=yes"], True),
        (["--use-rslora=1"], True),
        (["--use-rslora", "False"], False),
        (["--no-use-rslora"], False),
        (["--no_use_rslora"], False),
        (["--no-use-rslora=false"], True),
    ],
)
def test_flags(words: list[str], on: bool) -> None:
    assert flat(*words)["use_rslora"] is on


@pytest.mark.parametrize(
    "words, dtype",
    [(["--fp16"], "float16"), (["--bf16", "true", "--fp16=false"], "bfloat16"), (["--no-bf16"], "auto")],
)
def test_switches_that_stand_for_a_value(words: list[str], dtype: str) -> None:
    assert flat(*words)["dtype"] == dtype


def test_a_flag_leaves_the_next_word_alone() -> None:
    assert flat("--use-rslora", "--r", "4")["r"] == 4
    assert parse(["--json", "hello", "--adapter", "a"], generate.COMMAND).settings.prompt == "hello"


def test_switches_are_not_settings() -> None:
    assert train().on == frozenset()
    parsed = train("--resume", "--dry_run", "--json", "--no-progress")
    assert parsed.on == {"resume", "dry_run", "json", "no_progress"}
    assert parsed.json
    assert parsed.settings == train().settings
    assert not train("--resume", "--resume=false").on


def test_values_may_be_negative_or_hold_equals_signs() -> None:
    assert flat("--max-steps", "-1")["max_steps"] is None
    assert flat("--system-prompt", "a=b")["system_prompt"] == "a=b"
    assert flat("--system-prompt=--x=y")["system_prompt"] == "--x=y"
    assert flat("--system-prompt=")["system_prompt"] == ""


def test_lists_and_dictionaries() -> None:
    found = flat(
        "--target-modules", "q_proj,v_proj", "--rank-pattern", "q_proj=4,v_proj=8", "--alpha-pattern", '{"a": 1}'
    )
    assert found["target_modules"] == ["q_proj", "v_proj"]
    assert found["rank_pattern"] == {"q_proj": 4, "v_proj": 8}
    assert found["alpha_pattern"] == {"a": 1.0}


def test_lists_given_twice_add_up() -> None:
    assert flat("--target-modules", "q", "--lora-target-modules", "v,o")["target_modules"] == ["q", "v", "o"]
    words = ["--dataset", "d", "out/a", "--adapter", "out/b", "out/c,out/d"]
    settings: EvalSettings = parse(words, evaluation.COMMAND).settings
    assert settings.adapter == ["out/a", "out/b", "out/c", "out/d"]


def test_words_that_stand_alone() -> None:
    settings: GenerateSettings = parse(["Say hi", "--adapter", "a"], generate.COMMAND).settings
    assert settings.prompt == "Say hi"
    assert parse(["--adapter", "a", "--", "--help"], generate.COMMAND).settings.prompt == "--help"
    assert parse(["x=a", "b"], chat.COMMAND).settings.adapters == {"x": "a", "b": "b"}
    assert parse(["-", "--adapter", "a"], generate.COMMAND).settings.prompt == "-"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: from-file\nlora_r: 4\nlearning_rate: 1e-5\ntarget_modules: [q]\nsave_steps: 3\n")
    words = [
        str(file),
        "--dataset",
        "d",
        "--output-dir",
        "o",
        "--r",
        "8",
        "--target-modules",
        "v",
        "--save-steps",
        "none",
    ]
    config = parse(words, COMMAND).settings
    assert (config.base_model, config.lora.r, config.train.learning_rate) == ("from-file", 8, 1e-5)
    assert config.lora.target_modules == ["v"]
    assert config.train.save_steps is None


def test_a_file_cannot_ask_for_an_action(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text("resume: true\n")
    with pytest.raises(ConfigError, match="unknown option --resume"):
        train(str(file))


def test_every_fault_of_file_and_command_line_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_rnk: 3\nlora_dropout: 2\n")
    with pytest.raises(ConfigError) as caught:
        parse(
            [str(file), "--adaptor", "x", "--r", "0", "--seed", "1", "--seed", "2", "-q", "--json=maybe", "--lr"],
            COMMAND,
        )
    for part in (
        "unknown option --lora-rnk; did you mean --r?",
        "--lora-dropout: got 2, wanted a value less than 1",
        "unknown option --adaptor",
        "--r: got 0",
        "--seed is given twice: 1 and 2",
        "unknown option -q",
        "--json: got maybe, wanted true or false",
        "--lr needs a value",
        "--base-model is missing",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--jsn"], "unknown option --jsn; did you mean --json?"),
        (["--resum"], "did you mean --resume?"),
        (["-r", "8"], "unknown option -r; write --r"),
        (["stray"], "stray stands alone"),
        (["--no-r"], "unknown option --no-r"),
        (["--r", "--seed", "1"], "--r needs a value"),
        (["--r", "8.5"], "--r: got 8.5, wanted a whole number"),
        (["--use-rslora=perhaps"], "--use-rslora: got perhaps, wanted true or false"),
        (["--lr-scheduler-type", "cosinus"], "wanted 'linear', 'cosine' or 'constant'"),
    ],
)
def test_faults(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(*words)
    assert told in str(caught.value)


def test_help_wins_over_faults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--nonsense", "--help"], COMMAND)
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("veneer train: ")


@given(st.lists(st.text(max_size=12) | st.sampled_from([*GIVEN, "--r", "--json", "--", "-", "--=", "--no-", "="])))
def test_no_words_are_a_bug(words: list[str]) -> None:
    """Whatever is typed gives settings, help, or one ConfigError."""
    words = [word for word in words if not word.endswith((".yaml", ".yml")) and "\0" not in word]
    with contextlib.suppress(ConfigError, SystemExit):
        parse(words, COMMAND)


def test_a_word_that_a_flag_does_not_know() -> None:
    with pytest.raises(ConfigError, match="--gradient-checkpointing: got unsloth, wanted true or false or auto or off"):
        train("--gradient-checkpointing", "unsloth")


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--gradient-checkpointing"], True),
        (["--gradient-checkpointing", "offload"], "offload"),
        (["--gradient-checkpointing=AUTO"], "auto"),
        (["--gradient-checkpointing", "no"], False),
        (["--no-gradient-checkpointing"], False),
        ([], "auto"),
    ],
)
def test_a_flag_may_be_a_word(words: list[str], wanted: bool | str) -> None:
    assert flat(*words)["gradient_checkpointing"] == wanted
