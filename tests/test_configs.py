"""The settings in examples/configs: each is read as `veneer train` reads it, and its family can be trained."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from tests.train.conftest import pico_folder  # noqa: F401
from veneer.adapter.attach import attach, methods_of
from veneer.cli import train
from veneer.cli.parse import parse
from veneer.config import RunConfig, options_of, read_yaml
from veneer.model.load import load
from veneer.model.source import PACKAGED

FILES = sorted((Path(__file__).resolve().parent.parent / "examples" / "configs").glob("*.yaml"))
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}
# file -> (what transformers calls the family, its layers with adapters in each decoder layer)
FAMILIES = {
    "gemma-2": ("gemma2", 7),
    "gemma-3": ("gemma3_text", 7),
    "llama-3": ("llama", 7),
    "mistral": ("mistral", 7),
    "olmo-2": ("olmo2", 7),
    "phi": ("phi3", 4),
    "qwen-2.5": ("qwen2", 7),
    "qwen-3": ("qwen3", 7),
    "smollm": ("smollm3", 7),
}
MACHINES = {"laptop-cpu", "qlora-one-gpu", "several-gpus"}


def test_every_file_is_known() -> None:
    assert {path.stem for path in FILES} == set(FAMILIES) | MACHINES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_read_whole(path: Path) -> None:
    options = read_yaml(path)
    config = RunConfig.from_flat(options)
    assert set(options) <= set(options_of(RunConfig))  # our own names, no other spelling
    assert config.base_model in PACKAGED or re.fullmatch(r"[\w-]+/[\w.-]+", config.base_model)
    assert all(config.to_flat()[name] == value for name, value in options.items() if name != "gradient_checkpointing")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_first_line_is_the_command_that_uses_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[2])
    first = path.read_text(encoding="utf-8").splitlines()[0]
    words = shlex.split(first[first.index(": ") + 2 :])
    assert f"examples/configs/{path.name}" in words
    given = words[words.index("train") + 1 :]
    settings = parse(given, train.COMMAND).settings
    assert settings.base_model == read_yaml(path)["base_model"]
    assert settings.data.dataset == "train.jsonl"


def test_the_ones_for_a_machine_ask_for_what_they_are_called() -> None:
    config = {path.stem: RunConfig.from_flat(read_yaml(path)) for path in FILES}
    assert config["qlora-one-gpu"].storage == "nf4-dq"
    assert config["several-gpus"].train.fsdp
    assert config["laptop-cpu"].base_model in PACKAGED


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_can_be_trained(name: str, pico_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    from transformers import AutoConfig, AutoModelForCausalLM

    family, layers = FAMILIES[name]
    extra = {"query_pre_attn_scalar": 8} if "gemma" in family else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **extra)).save_pretrained(tmp_path)
    for file in (*pico_folder.glob("token*"), *pico_folder.glob("chat*")):
        shutil.copy(file, tmp_path)
    settings = RunConfig.from_flat(read_yaml(next(path for path in FILES if path.stem == name))).lora
    loaded = load(str(tmp_path), "float32")  # the probe refuses a family that the packed path computes otherwise
    attach(loaded.model, settings)
    assert len(methods_of(loaded.model, "default")) == 2 * layers
