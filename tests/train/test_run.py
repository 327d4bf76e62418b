"""A run: files in, adapter folder out; the same settings give the same bytes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.config import RunConfig
from veneer.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from veneer.model.layers import decoder_layers
from veneer.model.load import load
from veneer.model.losses import sequence_nll
from veneer.train import run
from veneer.train.ranks import Ranks
from veneer.train.rows import read_data

Config = Callable[..., RunConfig]
WEIGHTS = "adapter_model.safetensors"


def _train(config: RunConfig, **given: Any) -> run.TrainResult:
    return run.train(config, progress=False, **given)


def _bytes(config: RunConfig) -> bytes:
    return Path(config.output_dir, WEIGHTS).read_bytes()


def _metrics(config: RunConfig) -> list[dict]:
    return [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_leaves_behind(config: Config) -> None:
    one = config()
    result = _train(one)
    names = {path.name for path in Path(one.output_dir).iterdir()}
    assert names == {"adapter_config.json", WEIGHTS, "veneer.json", "run.yaml", "metrics.jsonl", "checkpoints"}
    assert [p.name for p in sorted(Path(one.output_dir, "checkpoints").iterdir())] == ["step-000009", "step-000012"]
    lines = _metrics(one)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 13))
    assert [line["step"] for line in lines if line["split"] == "eval"] == [0, 4, 8, 12]
    train, validation = lines[1], lines[0]
    wanted = {"job", "step", "epoch", "split", "loss", "learning_rate", "grad_norm", "tokens", "targets", "seconds"}
    assert train.keys() == wanted
    assert validation.keys() == wanted - {"learning_rate", "grad_norm", "tokens"}
    assert (result.steps, result.output_dir, result.learning_rate) == (12, one.output_dir, 1e-2)
    assert result.final_loss == [line["loss"] for line in lines if line["split"] == "train"][-1]
    assert result.eval_loss_before == validation["loss"]
    assert result.tokens == sum(line.get("tokens", 0) for line in lines)
    assert json.loads(json.dumps(result.to_json()))["trainable_parameters"] == result.trainable_parameters


def test_the_saved_adapter_is_the_one_that_was_best(config: Config, pico_folder: Path) -> None:
    one = config()
    result = _train(one)
    adapter = Adapter.load(one.output_dir)
    loaded = load(str(pico_folder), "float32")
    attach(loaded.model, adapter)
    validation = read_data(one, loaded.tokenizer).validation
    results = sequence_nll(loaded.model, validation, "default")
    loss = sum(nll for nll, _ in results) / sum(count for _, count in results)
    assert loss == pytest.approx(result.best_eval_loss, rel=1e-5)  # the scale was folded into b: rounding
    assert loss < result.eval_loss_before
    assert adapter.card.base == loaded.fingerprint
    assert adapter.card.training["options"]["r"] == 4
    assert adapter.card.training["steps"] == 12


def test_equal_settings_give_equal_bytes_and_another_seed_others(config: Config, tmp_path: Path) -> None:
    first, same, other = (
        config(output_dir=str(tmp_path / name), seed=seed, lora_dropout=0.1)
        for name, seed in (("first", 3), ("same", 3), ("other", 4))
    )
    for one in (first, same, other):
        _train(one)
    assert _bytes(first) == _bytes(same)
    assert _bytes(first) != _bytes(other)


needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


HARD = {
    "lora_dropout": 0.2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 3,
    "lr_scheduler_type": "cosine",
}


@pytest.fixture
def undisturbed(config: Config, tmp_path: Path) -> RunConfig:
    one = config(output_dir=str(tmp_path / "undisturbed"), **HARD)
    _train(one)
    return one


def test_a_resumed_run_ends_in_the_same_bytes(config: Config, undisturbed: RunConfig, stopping: Any) -> None:
    # before the first checkpoint, at one, after one, after a validation, at the last step
    for n in (1, 3, 5, 9, 12):
        one = config(**HARD)
        shutil.rmtree(one.output_dir, ignore_errors=True)
        stopping(one, n)
        assert not Path(one.output_dir, WEIGHTS).exists()
        result = _train(one, resume=True)
        assert _bytes(one) == _bytes(undisturbed), n
        assert [(line["step"], line["split"], line["loss"]) for line in _metrics(one)] == [
            (line["step"], line["split"], line["loss"]) for line in _metrics(undisturbed)
        ]
        assert any("resumed from" in note or "nothing to resume" in note for note in result.notes)


def test_a_finished_run_resumed_is_left_as_it_is(config: Config) -> None:
    one = config()
    before, whole = _train(one), _bytes(one)
    after = _train(one, resume=True)
    assert _bytes(one) == whole
    assert (after.steps, after.best_step, after.final_loss) == (before.steps, before.best_step, before.final_loss)


@pytest.mark.parametrize("optim", ["adamw", pytest.param("adamw_8bit", marks=needs_bitsandbytes)])
def test_a_run_updated_in_backward_is_resumed_to_the_same_bytes(
    config: Config, stopping: Any, tmp_path: Path, optim: str
) -> None:
    whole, cut = (  # r: more than the 4,096 numbers a layer of which bitsandbytes keeps 32 bits
        config(output_dir=str(tmp_path / name), optimizer_in_bwd=True, max_grad_norm=0, optim=optim, r=32)
        for name in ("whole", "cut")
    )
    _train(whole)
    stopping(cut, 7)
    _train(cut, resume=True)
    assert _bytes(cut) == _bytes(whole)


@pytest.mark.parametrize(
    "options",
    [{"method": "dora"}, {"init_lora_weights": "pissa"}, {"loraplus_lr_ratio": 4.0}, {"method": "dora", **HARD}],
    ids=["dora", "pissa", "loraplus", "dora with dropout"],
)
def test_every_method_trains_is_saved_and_resumed_to_the_same_bytes(
    config: Config, stopping: Any, tmp_path: Path, pico_folder: Path, options: dict
) -> None:
    whole, cut = (config(output_dir=str(tmp_path / name), **options) for name in ("whole", "cut"))
    result = _train(whole)
    stopping(cut, 7)
    _train(cut, resume=True)
    assert _bytes(cut) == _bytes(whole)
    assert result.best_eval_loss < result.eval_loss_before
    adapter = Adapter.load(whole.output_dir)
    assert adapter.card.method == options.get("method", "lora")
    assert set(adapter.card.ranks.values()) == {8 if "init_lora_weights" in options else 4}

    loaded = load(str(pico_folder), "float32", device="cpu")
    attach(loaded.model, adapter)
    model, ids = loaded.model, torch.tensor([[5, 9, 40, 7, 11]])
    theirs = AutoModelForCausalLM.from_pretrained(pico_folder, dtype=torch.float32)
    theirs = pytest.importorskip("peft").PeftModel.from_pretrained(theirs, whole.output_dir).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=2e-5)


def test_a_checkpoint_from_before_an_option_existed_is_this_runs(config: Config, stopping: Any) -> None:
    one = config()
    stopping(one, 7)
    for state in Path(one.output_dir).rglob("state.json"):
        held = json.loads(state.read_text())
        del held["run"]["optimizer_in_bwd"]
        state.write_text(json.dumps(held))
    _train(one, resume=True)


def test_early_stopping_is_resumed_to_the_same_bytes(config: Config, tmp_path: Path, stopping: Any) -> None:
    other = tmp_path / "other.jsonl"  # training on digits makes these rows less likely
    other.write_text('{"prompt": "Write 12", "completion": "@#!?&"}\n' * 3)
    options = {"eval_dataset": str(other), "eval_steps": 2, "early_stopping_patience": 3, "max_steps": 60}
    options |= {"learning_rate": 0.1}
    whole, cut = config(output_dir=str(tmp_path / "whole"), **options), config(**options)
    result = _train(whole)
    assert result.steps < 60, "never stopped early: it tests nothing"
    assert any("stopped early" in note for note in result.notes)
    stopping(cut, result.steps - 1)
    assert _train(cut, resume=True).steps == result.steps
    assert _bytes(cut) == _bytes(whole)


def test_a_resume_with_other_settings_or_data_is_refused(
    config: Config, stopping: Any, digits: Path, tmp_path: Path
) -> None:
    data = tmp_path / "own.jsonl"
    shutil.copy(digits, data)
    one = config(dataset=str(data))
    stopping(one, 7)
    written = Path(one.output_dir, "run.yaml").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        _train(config(dataset=str(data), r=8, weight_decay=0.5), resume=True)
    assert "r: it has 4, this run 8" in str(caught.value)
    assert "weight_decay: it has 0.0, this run 0.5" in str(caught.value)
    with data.open("a") as out:
        out.write('{"prompt": "Write 99", "completion": "nine nine"}\n')
    with pytest.raises(CheckpointError, match="data_sha256"):
        _train(one, resume=True)
    assert Path(one.output_dir, "run.yaml").read_bytes() == written


def test_what_touches_no_byte_may_change_in_a_resume(
    config: Config, tmp_path: Path, stopping: Any, undisturbed: RunConfig
) -> None:
    stopping(config(**HARD), 7)
    moved = Path(config().output_dir).rename(tmp_path / "moved")
    one = config(
        output_dir=str(moved),
        save_steps=1,
        save_total_limit=None,
        logging_steps=3,
        gradient_checkpointing=True,
        run_name="moved",
        **HARD,
    )
    _train(one, resume=True)
    assert _bytes(one) == _bytes(undisturbed)


def test_a_damaged_checkpoint_names_the_way_out_and_it_works(
    config: Config, stopping: Any, undisturbed: RunConfig
) -> None:
    one = config(**HARD)
    stopping(one, 8)
    folder = Path(one.output_dir, "checkpoints", "step-000006")
    file = folder / "job-0.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=f"delete {folder} to resume from the one before"):
        _train(one, resume=True)
    shutil.rmtree(folder)
    _train(one, resume=True)
    assert _bytes(one) == _bytes(undisturbed)


def test_an_earlier_run_is_set_aside(config: Config) -> None:
    one = config()
    _train(one)
    first = _bytes(one)
    for number in (1, 2):
        result = _train(config(seed=number))
        aside = Path(f"{one.output_dir}.old-{number}")
        assert any(str(aside) in note for note in result.notes)
        assert (aside / WEIGHTS).exists()
    assert Path(f"{one.output_dir}.old-1", WEIGHTS).read_bytes() == first
    assert _bytes(one) != first


def test_other_files_in_the_output_folder_stay(config: Config) -> None:
    one = config()
    Path(one.output_dir).mkdir()
    Path(one.output_dir, "notes.txt").write_text("mine")
    _train(one)
    assert Path(one.output_dir, "notes.txt").read_text() == "mine"


def test_an_output_dir_that_is_a_file_is_refused(config: Config) -> None:
    one = config()
    Path(one.output_dir).write_text("mine")
    with pytest.raises(ConfigError, match=r"is a file; name a folder"):
        _train(one)
    assert Path(one.output_dir).read_text() == "mine"


def test_a_loss_that_is_not_finite_leaves_no_adapter(config: Config) -> None:
    one = config(learning_rate=1e30, warmup_steps=0)
    with pytest.raises(NonFiniteLossError, match=r"step 2 of 12 .*--learning-rate"):
        _train(one)
    assert not Path(one.output_dir, WEIGHTS).exists()
    assert not Path(one.output_dir, "veneer.json").exists()


def test_without_validation_rows(config: Config) -> None:
    one = config(validation_split=0, eval_steps=None)
    result = _train(one)
    assert (result.eval_loss_before, result.best_eval_loss, result.best_step) == (None, None, 0)
    assert {line["split"] for line in _metrics(one)} == {"train"}
    assert any(Adapter.load(one.output_dir).factors(m)[1].any() for m in Adapter.load(one.output_dir).modules())


def test_too_few_rows_for_a_share_are_said_aloud(config: Config, tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    result = _train(config(dataset=str(data), eval_steps=None))
    assert any("no validation rows" in note for note in result.notes)


def test_validation_rows_of_their_own_file(config: Config, tmp_path: Path) -> None:
    data = tmp_path / "validation.jsonl"
    data.write_text('{"prompt": "Write 07", "completion": "zero seven"}\n' * 3)
    one = config(eval_dataset=str(data))
    _train(one)
    lines = [line for line in _metrics(one) if line["split"] == "eval"]
    assert Adapter.load(one.output_dir).card.training["data"]["rows"] == 80
    assert len({line["targets"] for line in lines}) == 1
    assert lines[0]["targets"] % 3 == 0


def test_repeated_prompts_stay_on_one_side_of_the_split(config: Config, tmp_path: Path, pico_folder: Path) -> None:
    data = tmp_path / "twice.jsonl"
    rows = [{"prompt": f"Write {n % 10}", "completion": f"answer {n}"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_data(config(dataset=str(data), validation_split=0.25), load(str(pico_folder)).tokenizer)
    assert len(found.validation) >= 10
    prompts = [
        {example.input_ids[: example.targets.index(True)] for example in side}
        for side in (found.train, found.validation)
    ]
    assert not prompts[0] & prompts[1]


def test_a_fault_in_the_data_shows_before_anything_is_written(config: Config, tmp_path: Path) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError):
        _train(config(dataset=str(data)))
    assert not Path(config().output_dir).exists()


def test_defaults_give_no_warning(config: Config) -> None:
    result = _train(config(learning_rate="auto", r=16, max_steps=1))
    assert result.warnings == ()


@pytest.mark.parametrize("asked", [True, False])
def test_layers_are_computed_twice_where_asked(
    config: Config, pico_folder: Path, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, found, whole = load(str(pico_folder), "float32"), [], run.loop

    def watched(model: Any, *given: Any, **named: Any) -> None:
        found.extend(vars(layer)["forward"].number is not None for layer in decoder_layers(model))
        whole(model, *given, **named)

    monkeypatch.setattr(run, "loop", watched)
    _train(config(gradient_checkpointing=asked), loaded=loaded)
    assert found == [asked] * 2
    assert not any("forward" in vars(layer) for layer in decoder_layers(loaded.model))  # as it was


def test_bfloat16_trains_too(config: Config) -> None:
    result = _train(config(dtype="bfloat16"))
    assert result.best_eval_loss < result.eval_loss_before
    assert torch.isfinite(torch.tensor(result.final_loss))


def test_dora_is_not_shared_out(config: Config) -> None:
    with pytest.raises(ConfigError, match="--method dora asks for whole rows"):
        _train(config(method="dora", fsdp=True))


def test_updates_in_backward_are_refused_for_several_processes(config: Config) -> None:
    with pytest.raises(ConfigError, match="summed over processes"):
        run._train(config(optimizer_in_bwd=True, max_grad_norm=0), False, False, None, Ranks(0, 2))
