"""transformers.Trainer with an attached model: the adapter is kept, put back, and Trainer's own files stay harmless."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from veneer.adapter.attach import attach
from veneer.adapter.callback import AdapterCallback
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.errors import AdapterError
from veneer.model.packed import speaking

IDS = torch.arange(3, 35).reshape(4, 8)
ROWS = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]


@pytest.fixture
def model(pico: Any) -> Any:
    return pico()


@pytest.fixture
def trainer(model: Any, tmp_path: Path) -> Callable[..., Trainer]:
    """trainer(on=the model, newly attached, callback, **arguments): 6 steps with a checkpoint each two."""

    def make(on: Any = None, callback: Any = None, **given: Any) -> Trainer:
        on = on or attach(model, LoraSettings(r=4), seed=1)
        common = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none"}
        settings = TrainingArguments(str(tmp_path / "out"), **{**common, **given})
        callback = callback or AdapterCallback(base_name="pico")
        return Trainer(on, settings, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[callback])

    return make


@torch.no_grad()
def _logits(model: Any, slot: str | None = "default") -> torch.Tensor:
    with speaking(model.eval(), slot):
        return model(input_ids=IDS).logits


def _equal(left: Adapter, right: Adapter) -> bool:
    return all(torch.equal(left.tensors[name], right.tensors[name]) for name in left.tensors | right.tensors)


def test_the_adapter_is_saved_and_speaks_as_it_was_trained(pico: Any, model: Any, trainer: Any, tmp_path: Path) -> None:
    base = {name: value.clone() for name, value in model.state_dict().items()}
    one = trainer()
    one.train()
    adapter = Adapter.load(tmp_path / "out" / "adapter")
    assert _equal(adapter, take(model))
    assert adapter.card.base_name == "pico"
    history = adapter.card.training["log_history"]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert history[0]["loss"] > history[5]["loss"]
    assert adapter.card.training["steps"] == 6
    fresh = attach(pico(), adapter)
    # the scale 32 / 4 is a power of two: folding it rounds nothing
    assert torch.equal(_logits(fresh), _logits(model))
    assert (_logits(model) - _logits(model, None)).abs().max() > 1e-3
    assert all(torch.equal(base[name], value) for name, value in model.state_dict().items())


def test_each_checkpoint_has_its_adapter(model: Any, trainer: Any, tmp_path: Path) -> None:
    trainer().train()
    found = [Adapter.load(tmp_path / "out" / f"checkpoint-{step}" / "adapter") for step in (2, 4, 6)]
    assert [adapter.card.training["steps"] for adapter in found] == [2, 4, 6]
    assert not _equal(found[0], found[1])
    assert _equal(found[2], take(model))


def test_a_crash_leaves_the_adapter_of_the_last_checkpoint(model: Any, trainer: Any, tmp_path: Path) -> None:
    class Crash(AdapterCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 5:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(callback=Crash()).train()
    kept, last = (Adapter.load(tmp_path / "out" / folder / "adapter") for folder in ("", "checkpoint-4"))
    assert _equal(kept, last)


def test_trainers_own_checkpoint_is_the_base(model: Any, trainer: Any, tmp_path: Path) -> None:
    keys = set(model.state_dict())
    base = _logits(model, None)
    trainer().train()
    folder = tmp_path / "out" / "checkpoint-6"
    saved = set(load_file(folder / "model.safetensors"))
    assert saved <= keys
    assert not [key for key in saved if "slots" in key or "base." in key]
    assert torch.equal(_logits(LlamaForCausalLM.from_pretrained(folder), None), base)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains_the_same(pico: Any, model: Any, trainer: Any, reentrant: bool) -> None:
    given = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    other = pico()
    trainer(save_strategy="no").train()
    attach(other, LoraSettings(r=4), seed=1)
    if reentrant:
        other.enable_input_require_grads()  # torch's reentrant kind needs it; Trainer's default is the other kind
    one = trainer(other, save_strategy="no", **given)
    one.train()
    assert other.is_gradient_checkpointing
    plain, sparing = take(model).tensors, take(other).tensors
    # the same products, computed twice; Adam enlarges what rounding is left
    assert all(torch.allclose(plain[name], sparing[name], rtol=1e-3, atol=1e-5) for name in plain)


def test_a_resumed_training_goes_on_with_the_adapter(pico: Any, model: Any, trainer: Any, tmp_path: Path) -> None:
    trainer().train()
    wanted = take(model)
    other = pico()
    attach(other, LoraSettings(r=4), seed=9)  # other starting values, to be replaced
    trainer(other).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert _equal(take(other), wanted)


def test_the_best_checkpoint_is_put_back(model: Any, trainer: Any, tmp_path: Path) -> None:
    given = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    # "greater is better" on a loss that falls: the first checkpoint is the best
    trainer(metric_for_best_model="eval_loss", **given).train()
    best = Adapter.load(tmp_path / "out" / "checkpoint-2" / "adapter")
    assert _equal(take(model), best)
    saved = Adapter.load(tmp_path / "out" / "adapter")
    assert _equal(saved, best)
    assert saved.card.training["best_step"] == 2


def test_another_slot(model: Any, trainer: Any, tmp_path: Path) -> None:
    attach(model, LoraSettings(r=2), "mine")
    trainer(model, AdapterCallback("mine")).train()
    assert _equal(Adapter.load(tmp_path / "out" / "adapter"), take(model, "mine"))


def test_nothing_attached_is_refused_before_the_first_step(model: Any, trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter named 'default' is attached"):
        trainer(model).train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_resume_with_another_adapter_or_without_one_is_refused(
    pico: Any, model: Any, trainer: Any, tmp_path: Path
) -> None:
    trainer().train()
    other = pico()
    attach(other, LoraSettings(r=2, target_modules=["q_proj"]))
    checkpoint = tmp_path / "out" / "checkpoint-4"
    callback = AdapterCallback()
    with pytest.raises(AdapterError, match=r"(?s)holds another adapter:.*q_proj.*Attach with the settings"):
        callback._put_back(other, checkpoint)
    for file in (checkpoint / "adapter").iterdir():
        file.unlink()
    (checkpoint / "adapter").rmdir()
    with pytest.raises(AdapterError, match="no such folder"):
        trainer(model).train(resume_from_checkpoint=str(checkpoint))


def test_a_model_that_peft_wrapped_is_refused(model: Any, trainer: Any) -> None:
    peft = pytest.importorskip("peft", reason="the extra `compare` installs it")
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"])
    wrapped = peft.get_peft_model(attach(model, LoraSettings(r=4)), settings)
    with pytest.raises(AdapterError, match="leave peft_config out"):
        trainer(wrapped).train()
