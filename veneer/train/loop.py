"""The training loop: N adapters over one base, one packed forward for all of them.

Each job has its own data, settings, schedule, clipping and optimiser state; its losses are those of a run alone,
because segments do not see each other and the base is frozen. Where several processes train together
(`veneer.train.ranks`), each runs its share of every batch's rows, and what is summed over them decides: every process
takes the same steps, stops at the same one, and finds the same fault.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from veneer.errors import NonFiniteLossError, listed
from veneer.model.losses import STREAM, sequence_nll, streams_of
from veneer.train.feed import NOTHING, Feed
from veneer.train.job import Job
from veneer.train.memory import memory_explained
from veneer.train.passes import Passes
from veneer.train.ranks import ALONE, Ranks

Record = Callable[[Job, dict], None]
Save = Callable[[Sequence[Job]], object]


def loop(
    model: nn.Module,
    jobs: Sequence[Job],
    *,
    record: Record,
    save: Save,
    ranks: Ranks = ALONE,
    graphs: bool = False,
) -> None:
    """Trains all jobs to their end. `record` gets the facts of every step and validation, `save` asks for a checkpoint.

    graphs: passes whose shape comes back run as CUDA graphs (`veneer.train.passes`); on a GPU.
    Raises NonFiniteLossError with every job that failed, after the others have finished; NotEnoughMemoryError at once.
    """
    with memory_explained(model, jobs, ranks):
        _run(Feed(Passes(model, graphs), ranks), jobs, record, save)
    failures = [str(job.failure) for job in jobs if job.failure]
    if failures:
        raise NonFiniteLossError(listed("training stopped:", failures) if len(failures) > 1 else failures[0])


def _run(feed: Feed, jobs: Sequence[Job], record: Record, save: Save) -> None:
    model, ranks = feed.passes.model, feed.ranks
    for job in jobs:
        if job.step == 0:
            _validate(model, job, record, ranks)
    while active := [job for job in jobs if not job.done]:
        _step(feed, active, record)
        for job in active:
            if not job.failure and (job.step % job.eval_steps == 0 or job.step == job.total):
                _validate(model, job, record, ranks)
        if any(job.step % job.save_steps == 0 for job in active if not job.failure):
            save(jobs)
    for job in jobs:
        job.finish()


def _step(feed: Feed, jobs: Sequence[Job], record: Record) -> None:
    """One optimiser step of every job. Jobs with fewer micro-batches than others wait for them."""
    started = time.perf_counter()
    losses = feed.computed(jobs)  # a sum over the rows that this process computed, for each job
    totals = feed.ranks.sum_(losses)
    for job, (loss, tokens) in zip(jobs, totals.tolist(), strict=True):
        feed.ranks.sum_(job.flat.grads_P)
        targets = job.targets_of_step()
        facts = job.update(loss)
        if not (math.isfinite(loss) and math.isfinite(facts["grad_norm"])):
            job.failure = _failure(job, loss, facts)
            continue
        seconds = time.perf_counter() - started
        job.last_loss, job.seconds, job.tokens = loss, job.seconds + seconds, job.tokens + int(tokens)
        record(
            job,
            {
                "split": "train",
                "loss": loss,
                **facts,
                "tokens": int(tokens),
                "targets": targets,
                "seconds": seconds,
            },
        )


def _validate(model: nn.Module, job: Job, record: Record, ranks: Ranks) -> None:
    if not job.validation:
        return
    started = time.perf_counter()
    sums = torch.zeros(2, dtype=torch.float64)
    for group in streams_of(job.validation, STREAM * ranks.world):
        rows = ranks.share(group) or [NOTHING]
        # All rows in one pass: every process must make as many.
        sums += torch.tensor(sequence_nll(model, rows, job.slot, max_tokens=sys.maxsize), dtype=torch.float64).sum(0)
    nll, targets = ranks.sum_(sums.to(_device([job]))).tolist()
    loss = nll / targets
    if math.isfinite(loss):
        job.note_validation(loss)
    record(job, {"split": "eval", "loss": loss, "targets": int(targets), "seconds": time.perf_counter() - started})


def _device(jobs: Sequence[Job]) -> torch.device:
    return jobs[0].flat.values_P.device


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
