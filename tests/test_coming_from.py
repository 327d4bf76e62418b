"""docs/coming-from.md says what is so: every option exists, what is read "as it is" is read, the rest is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from veneer.cli.train import COMMAND
from veneer.config import SHORTHANDS, MergeSettings, RunConfig, Settings, options_of, read_recipe, read_yaml
from veneer.errors import ConfigError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "coming-from.md"
MERGES = "From mergekit, and from PEFT's `add_weighted_adapter`"


def spellings_of(settings: type[Settings]) -> dict[str, str]:
    options = options_of(settings)
    found = {spelling: name for name, option in options.items() for spelling in (*option.aliases, name)}
    return found | {short: name for short, (name, _) in SHORTHANDS.items() if name in options}


SPELLINGS, OF_MERGE = spellings_of(RunConfig), spellings_of(MergeSettings)
NEEDED = {"base_model": "smollm2", "dataset": "train.jsonl", "output_dir": "out"}


def rows(text: str) -> list[tuple[str, list[str], str, str]]:
    """(tool, their keys, the cell of ours, what to know) of every row of every table."""
    found, tool = [], ""
    for line in text.splitlines():
        tool = line[3:] if line.startswith("## ") else tool
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            assert len(cells) == 3, line
            found.append((tool, re.findall(r"`(\w+)`", cells[0]), cells[1], cells[2]))
    return found


def faults(tool: str, theirs: list[str], ours: str, told: str) -> list[str]:
    """What a row claims and is not so."""
    names = re.findall(r"`(?:--)?(\w+)`", ours)
    spellings = OF_MERGE if tool == MERGES else SPELLINGS
    known = {*spellings.values(), *COMMAND.all_switches}
    wrong = [f"{tool}: no option {name}" for name in names if name not in known]
    if ours not in ("the same", "refused") and not names:
        wrong.append(f"{tool}: {ours!r} names no option")
    for key in theirs:
        read_as = spellings.get(key)
        wanted = (key if ours == "the same" else names[0] if names else None) if told.startswith("as it is") else None
        if read_as != wanted:
            wrong.append(f"{tool}: {key} is read as {read_as}, the page says {wanted or 'that it is not read'}")
    return wrong


ROWS = rows(PAGE.read_text(encoding="utf-8"))


def test_every_row_is_so() -> None:
    assert [fault for row in ROWS for fault in faults(*row)] == []


def test_each_tool_has_its_table() -> None:
    tools = [tool for tool, *_ in ROWS]
    assert {tool: tools.count(tool) > 8 for tool in tools} == dict.fromkeys(
        ("From PEFT and TRL", "From axolotl", "From LLaMA-Factory", "From Unsloth", MERGES), True
    )


@pytest.mark.parametrize("key", sorted({k for _, keys, _, _ in ROWS for k in keys} - {*SPELLINGS, *OF_MERGE}))
def test_what_is_not_read_is_an_error_that_names_it(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"- {key}: \w"):  # not "unknown option": why, and what to do instead
        RunConfig.from_flat({**NEEDED, key: "true"})


def test_options_in_the_prose_exist() -> None:
    prose = "\n".join(line for line in PAGE.read_text(encoding="utf-8").splitlines() if not line.startswith("|"))
    outside = re.sub(r"^```.*?^```", "", prose, flags=re.DOTALL | re.MULTILINE)
    names = set(re.findall(r"`(\w+_\w+)(?:: [\w.]+)?`", outside))
    assert names - {
        "get_peft_model",
        "train_on_responses_only",
        "save_pretrained_merged",
        "save_pretrained_gguf",
        "add_weighted_adapter",
    } <= set(SPELLINGS)


def test_the_file_of_settings_is_one(tmp_path: Path) -> None:
    run, recipe = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    options = read_recipe(tmp_path / "recipe.yaml")
    assert MergeSettings.from_flat({**options, "output": "o"}).adapters[0] == f"{tmp_path}/../math"
    (tmp_path / "run.yaml").write_text(run, encoding="utf-8")
    assert RunConfig.from_flat(read_yaml(tmp_path / "run.yaml")).storage == "nf4"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"max_steps": -1}, {"max_steps": None}),
        ({"optimizer": "adamw_bnb_8bit"}, {"optim": "adamw_8bit"}),
        ({"optim": "paged_adamw_32bit"}, {"optim": "paged_adamw"}),
        ({"use_gradient_checkpointing": "offload"}, {"gradient_checkpointing": "offload"}),
        ({"gradient_checkpointing": "auto"}, {"gradient_checkpointing": "auto"}),
        ({"val_set_size": 0.1}, {"validation_split": 0.1}),
        ({"load_in_4bit": True, "double_quantization": True}, {"bnb_4bit_use_double_quant": True}),
    ],
)
def test_values_that_it_names_are_read(options: dict, wanted: dict) -> None:
    flat = RunConfig.from_flat({**NEEDED, **options}).to_flat()
    assert {name: flat[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"lr_scheduler_type": "polynomial"},
        {"optim": "lion_8bit"},
        {"fsdp": ["full_shard", "auto_wrap"]},
        {"template": "llama3"},
        {"use_gradient_checkpointing": "unsloth"},
        {"hub_model_id": "me/skill"},
    ],
)
def test_values_that_it_calls_refused_are(options: dict) -> None:
    with pytest.raises(ConfigError):
        RunConfig.from_flat({**NEEDED, **options})


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (("T", ["lora_r"], "`rank`", "as it is"), "no option rank"),
        (("T", ["lora_r"], "refused", ""), "lora_r is read as r"),
        (("T", ["lora_rr"], "`r`", "as it is"), "lora_rr is read as None"),
        (("T", ["lora_rr"], "somehow", ""), "names no option"),
    ],
)
def test_a_wrong_row_is_found(row: tuple[str, list[str], str, str], fault: str) -> None:
    assert any(fault in told for told in faults(*row))
