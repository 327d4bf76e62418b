"""The training loop: N adapters over one base, one packed forward for all of them.

Each job has its own data, settings, schedule, clipping and optimiser state; its losses are those of a run alone,
because segments do not see each other and the base is frozen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from veneer.errors import NonFiniteLossError, listed
from veneer.model.losses import cross_entropy, sequence_nll, targets_of
from veneer.model.packed import running
from veneer.model.stream import EVEN, pack
from veneer.train.job import Job

Record = Callable[[Job, dict], None]
Save = Callable[[Sequence[Job]], object]


def loop(model: nn.Module, jobs: Sequence[Job], *, record: Record, save: Save) -> None:
    """Trains all jobs to their end. `record` gets the facts of every step and validation, `save` asks for a checkpoint.

    Raises NonFiniteLossError with every job that failed, after the others have finished.
    """
    for job in jobs:
        if job.step == 0:
            _validate(model, job, record)
    while active := [job for job in jobs if not job.done]:
        _step(model, active, record)
        for job in active:
            if not job.failure and (job.step % job.eval_steps == 0 or job.step == job.total):
                _validate(model, job, record)
        if any(job.step % job.save_steps == 0 for job in active if not job.failure):
            save(jobs)
    for job in jobs:
        job.finish()
    failures = [str(job.failure) for job in jobs if job.failure]
    if failures:
        raise NonFiniteLossError(listed("training stopped:", failures) if len(failures) > 1 else failures[0])


def _step(model: nn.Module, jobs: Sequence[Job], record: Record) -> None:
    """One optimiser step of every job. Jobs with fewer micro-batches than others wait for them."""
    started = time.perf_counter()
    targets = {job.slot: job.targets_of_step() for job in jobs}
    losses = {job.slot: 0.0 for job in jobs}
    tokens = {job.slot: 0 for job in jobs}
    for micro in range(max(job.settings.gradient_accumulation_steps for job in jobs)):
        here = [job for job in jobs if micro < job.settings.gradient_accumulation_steps]
        for slot, (loss, count) in _forward_backward(model, here, micro, targets).items():
            losses[slot] += loss
            tokens[slot] += count
    for job in jobs:
        loss = losses[job.slot]
        facts = job.update(loss)
        if not (math.isfinite(loss) and math.isfinite(facts["grad_norm"])):
            job.failure = _failure(job, loss, facts)
            continue
        seconds = time.perf_counter() - started
        job.last_loss, job.seconds, job.tokens = loss, job.seconds + seconds, job.tokens + tokens[job.slot]
        record(
            job,
            {
                "split": "train",
                "loss": loss,
                **facts,
                "tokens": tokens[job.slot],
                "targets": targets[job.slot],
                "seconds": seconds,
            },
        )


def _forward_backward(
    model: nn.Module, jobs: Sequence[Job], micro: int, targets: dict[str, int]
) -> dict[str, tuple[float, int]]:
    """Adds the gradients of one micro-batch of every job; returns each job's share of its loss, and its tokens."""
    batches = [(job, example) for job in jobs for example in job.rows(micro)]
    keys = {job.slot: key for job in jobs if (key := job.dropout_key(micro)) is not None}
    device = jobs[0].flat.values_P.device
    sequences, slots = [example.input_ids for _, example in batches], [job.slot for job, _ in batches]
    stream = pack(sequences, slots, device, keys, share=True, multiple=EVEN)
    weights_N = torch.tensor([1.0 / targets[job.slot] for job, _ in batches], device=device)
    with running(model, stream):
        sums_N, _ = cross_entropy(model, stream, targets_of(stream, [example.targets for _, example in batches]))
        losses_N = sums_N * weights_N
        losses_N.sum().backward()
    shares = losses_N.detach().tolist()
    out: dict[str, tuple[float, int]] = {}
    for (job, example), share in zip(batches, shares, strict=True):
        loss, count = out.get(job.slot, (0.0, 0))
        out[job.slot] = loss + share, count + len(example.input_ids)
    return out


def _validate(model: nn.Module, job: Job, record: Record) -> None:
    if not job.validation:
        return
    started = time.perf_counter()
    results = sequence_nll(model, job.validation, job.slot)
    targets = sum(count for _, count in results)
    loss = sum(nll for nll, _ in results) / targets
    if math.isfinite(loss):
        job.note_validation(loss)
    record(job, {"split": "eval", "loss": loss, "targets": targets, "seconds": time.perf_counter() - started})


def _failure(job: Job, loss: float, facts: dict[str, float]) -> NonFiniteLossError:
    micros = range(job.settings.gradient_accumulation_steps)
    rows = sorted({example.row + 1 for micro in micros for example in job.rows(micro)})[:8]
    rate, norm = facts["learning_rate"], facts["grad_norm"]
    return NonFiniteLossError(
        f"{job.slot}: step {job.step + 1} of {job.total} gave loss {loss:g} and gradient norm {norm:g} at learning "
        f"rate {rate:.3g} (last finite loss {job.last_loss:.4g}; rows {rows} of the data). The adapter was not "
        f"updated. Next: a lower --learning-rate (try {rate / 3:.1g}), or look at these rows; the last checkpoint "
        "stands."
    )
