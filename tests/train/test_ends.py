"""Runs that train embedding, head or rows of tokens: they learn, resume to the same bytes, and merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.config import RunConfig
from veneer.errors import CheckpointError, ConfigError, NotMergeable
from veneer.merge.into_base import merge_into_base
from veneer.model.load import load
from veneer.train.dry_run import base_parameters
from veneer.train.run import train

Config = Callable[..., RunConfig]
TIED = "ignore:.*share one weight:UserWarning"
IDS = torch.arange(3, 43).reshape(2, 20)


def raw(folder: str | Path) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "embed_tokens,lm_head,q_proj", "lora_dropout": 0.1},
        {"trainable_token_indices": "0,1,2", "gradient_checkpointing": True},
        {"trainable_token_indices": '{"embed_tokens": [0, 1], "lm_head": [0, 1]}', "loraplus_lr_ratio": 4},
        {"target_modules": "lm_head,down_proj", "trainable_token_indices": "0,1,2", "optimizer_in_bwd": True,
         "max_grad_norm": 0},
    ],
    ids=["factors", "rows", "rows of both", "updated in backward"],
)  # fmt: skip
def test_a_run_learns_and_is_resumed_to_the_same_bytes(
    config: Config, stopping: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = config(**options)
    result = train(whole, progress=False)
    assert result.eval_loss_before is not None and result.best_eval_loss is not None
    assert result.best_eval_loss < result.eval_loss_before - 0.1
    adapter = Adapter.load(whole.output_dir)
    assert set(adapter.card.training["update_norms"]) == {*adapter.modules(), *adapter.rows()}
    assert min(adapter.card.training["update_norms"].values()) > 0
    broken = config(**options, output_dir=str(tmp_path / "broken"))
    stopping(broken, 8)
    train(broken, resume=True, progress=False)
    assert raw(broken.output_dir) == raw(whole.output_dir)
    changed = {**options, "trainable_token_indices": "5", "target_modules": "q_proj"}
    other = config(**changed, output_dir=str(tmp_path / "broken"))
    with pytest.raises(CheckpointError, match=r"trainable_token_indices: it has .*, this run \[5\]"):
        train(other, resume=True, progress=False)


def test_trained_rows_merge_into_a_tied_base(config: Config, pico_folder: Path, tmp_path: Path) -> None:
    run = config(trainable_token_indices="0,1,2", target_modules="q_proj,v_proj")
    train(run, progress=False)
    loaded = load(str(pico_folder), "float32")
    parameters = base_parameters(loaded.model)
    model = attach(loaded.model, Adapter.load(run.output_dir))
    assert base_parameters(model) == parameters  # a tied head is not counted twice
    wanted = model(input_ids=IDS).logits.detach()
    report = merge_into_base(run.output_dir, str(pico_folder), str(tmp_path / "merged"), "float32")
    assert report.layers == 5 and report.logits_difference < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(input_ids=IDS).logits.detach(), wanted, rtol=1e-4, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.filterwarnings(TIED)
def test_factors_of_a_tied_embedding_are_not_merged_and_nothing_is_written(
    config: Config, pico_folder: Path, tmp_path: Path
) -> None:
    run = config(target_modules="embed_tokens,q_proj", max_steps=2, eval_steps=2)
    train(run, progress=False)
    with pytest.raises(NotMergeable, match=r"share one weight \(tied\)"):
        merge_into_base(run.output_dir, str(pico_folder), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_ids_that_the_base_lacks_are_told_before_anything_is_written(config: Config) -> None:
    run = config(trainable_token_indices="0,5000")
    with pytest.raises(ConfigError, match=r"--trainable-token-indices:(.|\n)*ids outside its \d+ rows.*5000"):
        train(run, progress=False)
    assert not Path(run.output_dir).exists()
