"""One job: how long it is, what it does each step, what it keeps."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch

from veneer.config import TrainSettings
from veneer.errors import CheckpointError
from veneer.train.job import total_steps

FINITE = torch.tensor(1.0)
bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({"num_train_epochs": 3, "per_device_train_batch_size": 8}, 16, 6),
        ({"num_train_epochs": 3, "per_device_train_batch_size": 8}, 17, 9),  # a short batch is a batch
        ({"num_train_epochs": 0.5, "per_device_train_batch_size": 4}, 16, 2),
        ({"num_train_epochs": 0.001}, 16, 1),
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 8}, 24, 3),
        ({"num_train_epochs": 3, "max_steps": 7}, 1000, 7),
    ],
)
def test_total_steps(settings: dict, rows: int, steps: int) -> None:
    assert total_steps(TrainSettings(**settings), rows) == steps


def test_a_step_takes_its_rows_in_turn(pico: Any, job: Any, examples: Any) -> None:
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    one = job(pico, "one", examples(12), **settings)
    seen = []
    for step in range(2):
        one.step = step
        seen += [example.row for micro in range(2) for example in one.rows(micro)]
        targets = sum(sum(example.targets) for micro in range(2) for example in one.rows(micro))
        assert one.terms_of_step() == targets
    assert sorted(seen) == list(range(12))  # two steps are an epoch here


def test_update_clips_steps_and_clears(pico: Any, job: Any, examples: Any) -> None:
    one = job(pico, "one", examples(4), learning_rate=0.1, warmup_steps=0, max_grad_norm=0.5)
    before = one.flat.values_P.detach().clone()
    one.flat.grads_P.fill_(1.0)
    rate, norm = one.update(FINITE)
    assert (rate, float(norm)) == (0.1, pytest.approx(len(one.flat) ** 0.5))
    # Adam's first step is the rate, whatever the gradient's size
    torch.testing.assert_close(one.flat.values_P.detach(), before - 0.1, rtol=0, atol=1e-5)
    moment = one.optimizer.state[one.flat.values_P]["exp_avg"]
    assert float(torch.linalg.vector_norm(moment)) == pytest.approx(0.1 * 0.5, rel=1e-4)  # (1 - beta1) · clipped
    assert not one.flat.grads_P.any()
    assert one.step == 1


@pytest.mark.parametrize("optim", ["adamw", pytest.param("adamw_8bit", marks=bitsandbytes)])
@pytest.mark.parametrize(("gradient", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (0.25, math.inf), (0.25, math.nan)])
def test_nothing_changes_once_a_loss_or_gradient_was_not_finite(
    pico: Any, job: Any, examples: Any, gradient: float, loss: float, optim: str
) -> None:
    one = job(pico, "one", examples(4), optim=optim)
    one.flat.grads_P.fill_(0.5)
    one.update(FINITE)
    tensors, numbers = one.state()
    before = {name: value.clone() for name, value in tensors.items()}
    for broken in (True, False):  # this step, and one that was begun before anyone had looked
        one.flat.grads_P.fill_(gradient if broken else 0.25)
        one.update(torch.tensor(loss if broken else 1.0))
        assert not one.flat.grads_P.any()
    tensors, after = one.state()
    assert all(torch.equal(before[name], tensors[name]) for name in before)
    assert {**after, "step": 1} == numbers


def test_patience_counts_validations_without_gain(pico: Any, job: Any, examples: Any) -> None:
    one = job(pico, "one", examples(4), examples(2), early_stopping_patience=2)
    for loss, done in ((3.0, False), (3.5, False), (2.0, False), (2.0, False), (2.5, True)):
        one.note_validation(loss)
        assert one.done is done
    assert one.best_loss == 2.0


def test_state_and_restore_are_inverse(pico: Any, job: Any, examples: Any, run_loop: Any) -> None:
    one = job(pico, "one", examples(8), examples(4), max_steps=4, eval_steps=2)
    two = job(pico, "two", examples(8), examples(4), max_steps=4, eval_steps=2)
    run_loop(pico, one)
    tensors, numbers = one.state()
    two.restore({name: value.clone() for name, value in tensors.items()}, numbers)
    again, numbers_again = two.state()
    assert numbers == numbers_again
    assert again.keys() == tensors.keys() >= {"values", "exp_avg", "exp_avg_sq", "best"}
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    for job_ in (one, two):  # and the next step is the same, to the bit
        job_.flat.grads_P.fill_(0.25)
        job_.update(FINITE)
    assert torch.equal(one.flat.values_P, two.flat.values_P)


def test_restore_refuses_another_size(pico: Any, job: Any, examples: Any) -> None:
    small, big = job(pico, "small", examples(4)), job(pico, "big", examples(4), lora={"r": 8})
    with pytest.raises(
        CheckpointError, match=f"'big' holds {len(small.flat)} parameters, this run has {len(big.flat)}"
    ):
        big.restore(*small.state())
