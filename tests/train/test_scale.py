"""Loss scaling in float16: skipped steps are counted and change nothing, and the scale is one of the job's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.config import RunConfig
from veneer.errors import ConfigError, NonFiniteLossError
from veneer.train import run, scale
from veneer.train.scale import LEAST, MOST, START, LossScale, Scaling

YES, NO = torch.tensor(True), torch.tensor(False)
FINITE = torch.tensor(1.0)


def _scaler() -> Any:
    # torch's own, as it stands in torch.amp.GradScaler: the oracle
    return torch.full((), START), torch.zeros((), dtype=torch.int32)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5))
def test_it_moves_as_torch_has_it(overflows: list[bool], interval: int) -> None:
    ours, (theirs, growth) = LossScale("cpu"), _scaler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "INTERVAL", interval)
        for overflow in overflows:
            ours.update(YES, torch.tensor(overflow))
            torch._amp_update_scale_(theirs, growth, torch.tensor(float(overflow)), 2.0, 0.5, interval)
            theirs.clamp_(LEAST, MOST)
    assert ours.read() == Scaling(theirs.item(), sum(overflows))


def test_below_the_least_scale_nothing_helps() -> None:
    ours = LossScale("cpu")
    hopeless = [bool(ours.update(YES, YES)) for _ in range(18)]
    assert hopeless == [False] * 16 + [True] * 2
    assert ours.read().scale == LEAST


def test_a_job_that_has_failed_changes_no_scale() -> None:
    ours = LossScale("cpu")
    assert not ours.update(NO, YES)
    assert ours.read() == Scaling(START, 0)


def test_an_overflow_is_skipped_and_the_next_step_is_taken(pico: Any, job: Any, examples: Any) -> None:
    one, plain = job(pico, "one", examples(4)), job(pico, "plain", examples(4))
    one.scale = LossScale("cpu")
    before = one.flat.values_P.detach().clone()
    one.flat.grads_P.fill_(math.inf)
    one.update(FINITE)
    assert torch.equal(one.flat.values_P, before)
    assert one.scale.read() == Scaling(START / 2, 1)
    assert not one.optimizer.state[one.flat.values_P]["exp_avg"].any()
    one.flat.grads_P.fill_(0.25 * START / 2)  # scaled, as backward leaves them
    plain.step = 1
    plain.flat.grads_P.fill_(0.25)
    norms = [each.update(FINITE)[1] for each in (one, plain)]
    assert norms[0] == norms[1]
    assert torch.equal(one.optimizer.state[one.flat.values_P]["exp_avg"], _moment(plain))
    assert bool(one.finite)


def _moment(job: Any) -> torch.Tensor:
    return job.optimizer.state[job.flat.values_P]["exp_avg"]


def test_a_loss_that_is_not_finite_is_no_matter_of_scale(pico: Any, job: Any, examples: Any) -> None:
    one = job(pico, "one", examples(4))
    one.scale = LossScale("cpu")
    one.flat.grads_P.fill_(1.0)
    one.update(torch.tensor(math.nan))
    assert not bool(one.finite)
    assert one.scale.read() == Scaling(START, 0)


def test_scaled_losses_train_as_plain_ones_do(pico: Any, job: Any, examples: Any, run_loop: Any) -> None:
    """Powers of two round nothing in float32: the same bytes, beside a job that is not scaled."""
    plain, other = job(pico, "plain", examples(8)), job(pico, "other", examples(8, 1))
    alone = run_loop(pico, plain, other)
    scaled, beside = job(pico, "scaled", examples(8)), job(pico, "beside", examples(8, 1))
    for path, method in scaled.methods.items():  # starting values are of the path and the seed alone
        assert method.state_dict().keys() == plain.methods[path].state_dict().keys()
    scaled.scale = LossScale("cpu")
    together = run_loop(pico, scaled, beside)
    assert torch.equal(scaled.flat.values_P, plain.flat.values_P)
    assert torch.equal(beside.flat.values_P, other.flat.values_P)
    assert [facts["loss"] for _, _, facts in together] == [facts["loss"] for _, _, facts in alone]
    told = [facts for slot, _, facts in together if slot == "scaled"]
    assert {facts["loss_scale"] for facts in told} == {START}
    assert all("loss_scale" not in facts for slot, _, facts in together if slot == "beside")


def _metrics(config: RunConfig) -> list[dict]:
    lines = [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


@pytest.fixture
def high(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first scale that overflows in float16, and growth that soon overflows again."""
    monkeypatch.setattr(scale, "START", 2.0**23)
    monkeypatch.setattr(scale, "INTERVAL", 4)


def test_float16_trains(config: Any, high: None) -> None:
    one = config(max_steps=24, dtype="float16")
    result = run.train(one, progress=False)
    assert result.best_eval_loss < result.eval_loss_before
    lines = _metrics(one)
    skipped = [line for line in lines if line["grad_norm"] is None]
    assert len(skipped) == lines[-1]["skipped_steps"] > 0, "nothing overflowed: it tests nothing"
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert any(f"{len(skipped)} steps were skipped" in note for note in result.notes)
    assert len({line["loss_scale"] for line in lines}) > 2


def test_a_resumed_run_in_float16_ends_in_the_same_bytes(
    config: Any, high: None, tmp_path: Path, stopping: Any
) -> None:
    whole, cut = (config(dtype="float16", output_dir=str(tmp_path / name)) for name in ("whole", "cut"))
    run.train(whole, progress=False)
    stopping(cut, 7)
    run.train(cut, progress=False, resume=True)
    bytes_of = [Path(one.output_dir, "adapter_model.safetensors").read_bytes() for one in (whole, cut)]
    assert bytes_of[0] == bytes_of[1]
    names = ("step", "loss_scale", "skipped_steps")
    scaling = [[tuple(line[name] for name in names) for line in _metrics(one)] for one in (whole, cut)]
    assert scaling[0] == scaling[1]
    assert scaling[0][5][2] > 0, "nothing was skipped before the checkpoint: it tests less"


def test_what_no_scale_mends_is_a_named_failure(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "START", 1.0)
    monkeypatch.setattr(run.checkpoint, "save", lambda *given: None)
    real = torch.Tensor.div_

    def overflowing(self: torch.Tensor, other: Any) -> torch.Tensor:  # as if backward had left infinity
        return real(self, other).fill_(math.inf)

    monkeypatch.setattr(torch.Tensor, "div_", overflowing)
    with pytest.raises(NonFiniteLossError, match=r"step 1 of 12 gave .*gradient norm inf .*--dtype bfloat16"):
        run.train(config(dtype="float16"), progress=False)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}, {"gradient_checkpointing": True}])
def test_float16_trains_on_a_gpu(config: Any, options: dict[str, Any]) -> None:
    one = config(dtype="float16", max_steps=24, **options)
    result = run.train(one, progress=False)
    assert result.best_eval_loss < result.eval_loss_before
    assert all(math.isfinite(line["loss"]) for line in _metrics(one))


def test_updates_in_backward_are_refused() -> None:
    needed = {"base_model": "b", "dataset": "d", "output_dir": "o", "optimizer_in_bwd": True, "max_grad_norm": 0}
    with pytest.raises(ConfigError, match="optimizer_in_bwd does not go with dtype float16"):
        RunConfig.from_flat({**needed, "fp16": True})
    RunConfig.from_flat({**needed, "bf16": True})
