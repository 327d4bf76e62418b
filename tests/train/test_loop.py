"""N adapters over one base: each trains as it would alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from veneer.adapter.attach import detach
from veneer.errors import NonFiniteLossError, NotEnoughMemoryError
from veneer.model.losses import sequence_nll

# Three jobs with nothing in common but the base. Data: (rows, seed) of training, (rows, seed) of validation.
JOBS: dict[str, dict[str, Any]] = {
    "plain": {"data": ((24, 1), (6, 11)), "max_steps": 9, "learning_rate": 1e-2, "eval_steps": 3, "lora": {"r": 4}},
    "dropping": {
        "data": ((16, 2), (5, 12)),
        "lora": {"r": 8, "lora_dropout": 0.3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        "max_steps": 14,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "seed": 5,
    },
    "stopping": {
        "data": ((8, 3), (4, 13)),
        "lora": {"r": 2, "lora_alpha": 8},
        "max_steps": 30,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 2,
        "eval_steps": 2,
        "early_stopping_patience": 2,
        "adam_epsilon": 1e-6,
    },
}


@pytest.fixture
def made(job: Any, examples: Any) -> Any:
    """made(model, *names): those of JOBS, attached."""

    def make(model: Any, *names: str) -> list:
        jobs = []
        for name in names:
            (train, validation), settings = JOBS[name]["data"], {k: v for k, v in JOBS[name].items() if k != "data"}
            jobs.append(job(model, name, examples(*train), examples(*validation), **settings))
        return jobs

    return make


def _losses(facts: list, slot: str, split: str) -> list[tuple[int, float]]:
    return [(step, fact["loss"]) for name, step, fact in facts if name == slot and fact["split"] == split]


def test_three_jobs_are_three_runs_alone(pico: Any, made: Any, run_loop: Any) -> None:
    together = made(pico, *JOBS)
    facts = run_loop(pico, *together)
    for job in together:
        values = job.flat.values_P.detach().clone()
        detach(pico, job.slot)
        (alone,) = made(pico, job.slot)
        facts_alone = run_loop(pico, alone)
        assert (job.step, job.best_step, job.stopped_early) == (alone.step, alone.best_step, alone.stopped_early)
        for split in ("train", "eval"):
            ours, theirs = _losses(facts, job.slot, split), _losses(facts_alone, job.slot, split)
            assert [step for step, _ in ours] == [step for step, _ in theirs]
            # Products over more rows are blocked in another way: float32 rounding, 1e-7 a step, fed back by training.
            assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=2e-5)
        # Adam divides by the gradient's size: where a gradient is near zero its rounding becomes a step of its own.
        difference = torch.linalg.vector_norm(values - alone.flat.values_P) / torch.linalg.vector_norm(values)
        assert difference < 1e-4
        detach(pico, job.slot)


def test_jobs_end_each_in_its_own_time(pico: Any, made: Any, run_loop: Any) -> None:
    plain, dropping, stopping = jobs = made(pico, *JOBS)
    facts = run_loop(pico, *jobs)
    assert (plain.step, dropping.step) == (9, 14)
    assert stopping.stopped_early
    assert stopping.step < 30
    assert stopping.evaluations_without_gain == 2
    for job in jobs:
        assert [step for step, _ in _losses(facts, job.slot, "train")] == list(range(1, job.step + 1))


def test_training_learns_and_leaves_the_base_alone(loud: Any, job: Any, examples: Any, run_loop: Any) -> None:
    before = {name: value.clone() for name, value in loud.state_dict().items()}
    one = job(loud, "one", examples(16), examples(4), max_steps=40, learning_rate=2e-2)
    facts = run_loop(loud, one)
    (_, first), *_, (_, last) = _losses(facts, "one", "eval")
    assert last < 0.5 * first
    after = loud.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_finite_stops_its_job_alone(pico: Any, made: Any, run_loop: Any) -> None:
    def poison(job: Any, facts: dict) -> None:
        if (job.slot, job.step, facts["split"]) == ("dropping", 3, "train"):
            next(iter(job.methods.values())).a_RI.data[0, 0] = math.nan

    jobs = made(pico, *JOBS)
    with pytest.raises(NonFiniteLossError) as caught:
        run_loop(pico, *jobs, watch=poison)
    message = str(caught.value)
    micros = range(jobs[1].settings.gradient_accumulation_steps)
    rows = sorted({example.row + 1 for micro in micros for example in jobs[1].rows(micro)})[:8]
    for part in ("dropping", "step 4 of 14", "loss nan", "learning rate 0.00", f"rows {rows}", "--learning-rate"):
        assert part in message
    assert "plain" not in message
    plain, dropping, stopping = jobs
    assert (plain.step, dropping.step, stopping.stopped_early) == (9, 3, True)
    for slot in JOBS:
        detach(pico, slot)
    for job in (plain, stopping):
        (alone,) = made(pico, job.slot)
        run_loop(pico, alone)
        # one job fewer from step 4 on: rounding as above
        difference = torch.linalg.vector_norm(job.flat.values_P - alone.flat.values_P)
        assert difference < 1e-4 * torch.linalg.vector_norm(alone.flat.values_P)
        detach(pico, job.slot)


def test_steps_begun_ahead_are_the_same_steps(pico: Any, made: Any, run_loop: Any) -> None:
    seen = []
    for ahead in (False, True):
        jobs = made(pico, *JOBS)
        facts = [
            (slot, {name: value for name, value in fact.items() if name != "seconds"})
            for slot, _, fact in run_loop(pico, *jobs, ahead=ahead)
        ]
        values = [job.flat.values_P.detach().clone() for job in jobs]
        seen.append((facts, values, [(job.step, job.tokens, job.last_loss, job.best_step) for job in jobs]))
        for slot in JOBS:
            detach(pico, slot)
    (facts, values, ends), (facts_ahead, values_ahead, ends_ahead) = seen
    assert facts == facts_ahead
    assert ends == ends_ahead
    assert all(map(torch.equal, values, values_ahead))


def test_a_step_begun_after_a_failed_one_changes_nothing(pico: Any, job: Any, examples: Any, run_loop: Any) -> None:
    one = job(pico, "one", examples(24), max_steps=6, save_steps=9, eval_steps=9)
    begun, values = one.update, []

    def broken(loss: torch.Tensor) -> Any:
        values.append(one.flat.values_P.detach().clone())
        if one.step == 2:
            one.flat.grads_P[0] = math.nan
        return begun(loss)

    one.update = broken
    with pytest.raises(NonFiniteLossError, match="step 3 of 6"):
        run_loop(pico, one, ahead=True)
    assert len(values) == 4, "no step was begun before the third was read: this tests nothing"
    assert one.step == 2
    assert torch.equal(one.flat.values_P, values[2])


@pytest.mark.parametrize("broken", [False, True])
def test_an_error_in_a_step_leaves_the_one_before_it_told(
    pico: Any, job: Any, examples: Any, run_loop: Any, broken: bool
) -> None:
    one = job(pico, "one", examples(24), max_steps=6, save_steps=9, eval_steps=9)
    own, told = one.update, []

    def update(loss: torch.Tensor) -> Any:
        if one.step == 3:
            raise MemoryError("no more")
        if one.step == 2 and broken:
            one.flat.grads_P[0] = math.nan
        return own(loss)

    one.update = update
    with pytest.raises(NonFiniteLossError if broken else NotEnoughMemoryError, match="step 3 of 6" if broken else None):
        run_loop(pico, one, ahead=True, watch=lambda job, facts: told.append(facts["step"]))
    assert told == ([1, 2] if broken else [1, 2, 3])


def test_every_failed_job_is_named(pico: Any, made: Any, run_loop: Any) -> None:
    def poison(job: Any, facts: dict) -> None:
        if job.step == 2 and job.slot != "plain":
            job.flat.values_P.data.fill_(math.inf)

    jobs = made(pico, *JOBS)
    with pytest.raises(NonFiniteLossError, match=r"(?s)dropping: step 3.*stopping: step 3"):
        run_loop(pico, *jobs, watch=poison)
    assert jobs[0].step == 9


def test_accumulation_is_a_bigger_batch(pico: Any, job: Any, examples: Any, run_loop: Any) -> None:
    # Rows have differing numbers of targets, so a mean of the micro-batches' means would be another loss.
    rows, validation = examples(16, seed=4), examples(4, seed=5)
    big = job(pico, "big", rows, validation, per_device_train_batch_size=8)
    small = job(pico, "small", rows, validation, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    facts = run_loop(pico, big) + run_loop(pico, small)
    for split in ("train", "eval"):
        wanted = [loss for _, loss in _losses(facts, "big", split)]
        # a gradient summed in two parts: rounding of float32
        assert [loss for _, loss in _losses(facts, "small", split)][-len(wanted) :] == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(big.flat.values_P, small.flat.values_P, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_over_trained_tokens(pico: Any, job: Any, examples: Any, run_loop: Any) -> None:
    rows = examples(4)
    results = sequence_nll(pico, rows, None)
    (facts,) = run_loop(pico, job(pico, "one", rows, max_steps=1))
    wanted = sum(nll for nll, _ in results) / sum(count for _, count in results)
    assert facts[2]["loss"] == pytest.approx(wanted, rel=1e-6)  # a new adapter speaks as the base
    assert facts[2]["targets"] == sum(count for _, count in results)
    assert facts[2]["tokens"] == sum(len(row.input_ids) for row in rows)
    assert json.dumps(facts[2])


def test_the_best_values_are_kept(loud: Any, job: Any, examples: Any, run_loop: Any) -> None:
    seen = {}

    def keep(job: Any, facts: dict) -> None:
        if facts["split"] == "eval":
            seen[job.step] = (facts["loss"], job.flat.values_P.detach().clone())

    # Validation rows want other completions than training rows: sooner or later training harms them.
    one = job(loud, "one", examples(8), examples(4, seed=50), max_steps=12, eval_steps=1, learning_rate=3e-2)
    run_loop(loud, one, watch=keep)
    best = min(seen, key=lambda step: seen[step][0])
    assert best < 12, "this run never got worse: it tests nothing"
    assert one.best_step == best
    assert torch.equal(one.flat.values_P, seen[best][1])


def test_the_last_values_are_kept_where_that_was_asked(loud: Any, job: Any, examples: Any, run_loop: Any) -> None:
    last = []

    def keep(job: Any, facts: dict) -> None:
        last[:] = [job.flat.values_P.detach().clone()]

    settings = {"max_steps": 12, "eval_steps": 1, "learning_rate": 3e-2, "load_best_model_at_end": False}
    one = job(loud, "one", examples(8), examples(4, seed=50), **settings)
    run_loop(loud, one, watch=keep)
    assert one.best_step < 12
    assert torch.equal(one.flat.values_P, last[0])


def test_without_validation_rows_nothing_is_validated(pico: Any, job: Any, examples: Any, run_loop: Any) -> None:
    one = job(pico, "one", examples(8), eval_steps=2)
    facts = run_loop(pico, one)
    assert {fact["split"] for *_, fact in facts} == {"train"}
    assert (one.step, one.best_P, one.stopped_early) == (6, None, False)


def test_tokens_and_seconds_add_up_over_all_steps(pico: Any, made: Any, run_loop: Any) -> None:
    lines: list[dict] = []
    (job,) = made(pico, "plain")
    run_loop(pico, job, watch=lambda _job, facts: lines.append(facts))
    steps = [line for line in lines if line["split"] == "train"]
    assert job.tokens == sum(line["tokens"] for line in steps) > 0
    assert job.seconds == pytest.approx(sum(line["seconds"] for line in steps))
