"""A run that trains experts: resumed, saved, computed by PEFT, merged into the base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import config_of, model_of
from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.config import RunConfig
from veneer.merge.into_base import merge_into_base
from veneer.model.load import load
from veneer.train import run


@pytest.fixture(scope="session")
def moe_folder(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of 2 layers and 4 experts, with the tokenizer of `pico_folder`."""
    tokenizer, folder = AutoTokenizer.from_pretrained(pico_folder), tmp_path_factory.mktemp("moe") / "pico"
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_of("qwen3_moe", vocab_size=len(tokenizer), head_dim=8, initializer_range=0.1, **more)
        model_of(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_over_experts_is_resumed_saved_and_merged(
    config: Callable[..., RunConfig], stopping: Any, moe_folder: Path, tmp_path: Path
) -> None:
    targets = {"target_modules": "q_proj,gate_up_proj,down_proj", "rank_pattern": "down_proj=2"}
    whole, cut = (
        config(base_model=str(moe_folder), output_dir=str(tmp_path / name), **targets) for name in ("whole", "cut")
    )
    result = run.train(whole, progress=False)
    assert result.best_eval_loss < result.eval_loss_before
    stopping(cut, 7)
    run.train(cut, progress=False, resume=True)
    weights = [Path(one.output_dir, "adapter_model.safetensors").read_bytes() for one in (whole, cut)]
    assert weights[0] == weights[1]

    adapter = Adapter.load(whole.output_dir)
    assert result.trainable_parameters == sum(tensor.numel() for tensor in adapter.tensors.values())
    assert {module.split(".")[-2]: rank for module, rank in adapter.card.ranks.items() if "experts" in module} == {
        "gate_up_proj": 4,
        "down_proj": 2,
    }
    norms = adapter.card.training["update_norms"]
    assert all(
        norms[f"model.layers.{layer}.mlp.experts.{name}"] > 0
        for layer in (0, 1)
        for name in ("gate_up_proj", "down_proj")
    )

    model, ids = attach(load(str(moe_folder), "float32", progress=False).model, adapter), torch.tensor([[5, 9, 40, 7]])
    plain = AutoModelForCausalLM.from_pretrained(moe_folder, dtype=torch.float32)
    theirs = pytest.importorskip("peft").PeftModel.from_pretrained(plain, whole.output_dir).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-4)

    report = merge_into_base(whole.output_dir, str(moe_folder), str(tmp_path / "merged"))
    assert report.layers == 6 and report.logits_difference < 1e-4 * report.logits_scale and report.update_norm > 0
    shutil.rmtree(tmp_path / "merged")
