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
from veneer.model.losses import STREAM, streams_of
from veneer.train.allocator import give_back_freed_memory
from veneer.train.feed import Feed
from veneer.train.job import Job
from veneer.train.memory import memory_explained
from veneer.train.passes import Passes
from veneer.train.ranks import ALONE, Ranks
from veneer.train.step import Record, StepReader, begin_step

TIDY = 8  # steps on a CPU after which freed memory goes back to the system
Save = Callable[[Sequence[Job]], object]


def loop(
    model: nn.Module,
    jobs: Sequence[Job],
    *,
    record: Record,
    save: Save,
    ranks: Ranks = ALONE,
    graphs: bool = False,
    ahead: bool | None = None,
) -> None:
    """Trains all jobs to their end. `record` gets the facts of every step and validation, `save` asks for a checkpoint.

    graphs: passes whose shape comes back run as CUDA graphs (`veneer.train.passes`); on a GPU.
    ahead: a step is begun before the facts of the one before it are read, so that the device need not wait for Python;
    None: on a GPU. The adapters are the same, to the byte.
    Raises NonFiniteLossError with every job that failed, after the others have finished; NotEnoughMemoryError at once.
    """
    ahead = _device(jobs).type == "cuda" if ahead is None else ahead
    with memory_explained(model, jobs, ranks):
        _run(Feed(Passes(model, graphs), ranks), jobs, record, save, ahead)
    raise_failures(jobs)


def raise_failures(jobs: Sequence[Job], cause: BaseException | None = None) -> None:
    """Raises NonFiniteLossError where jobs have failed."""
    failures = [str(job.failure) for job in jobs if job.failure]
    if failures:
        error = NonFiniteLossError(listed("training stopped:", failures) if len(failures) > 1 else failures[0])
        raise error from cause


def _run(feed: Feed, jobs: Sequence[Job], record: Record, save: Save, ahead: bool) -> None:
    model, ranks = feed.passes.model, feed.ranks
    for job in jobs:
        if job.step == 0:
            validate(model, job, record, ranks)
    reader = StepReader(record)
    while active := [job for job in jobs if not job.done]:
        try:
            step = begin_step(feed, active)
        except BaseException as error:
            reader.salvage()  # what has been computed is told, and where it failed, that is the cause
            raise_failures(jobs, error)
            raise
        reader.push(step)
        pausing = any(job.done or job.step % job.eval_steps == 0 or job.step % job.save_steps == 0 for job in active)
        if ahead and not pausing:
            continue
        _tidy(active)  # before the step is read, so that it counts as the step's time
        reader.flush()
        for job in active:
            if not job.failure and (job.step % job.eval_steps == 0 or job.step == job.total):
                validate(model, job, record, ranks)
        if any(job.step % job.save_steps == 0 for job in active if not job.failure):
            save(jobs)
        reader.last_read = time.perf_counter()
    for job in jobs:
        job.finish()


def _tidy(jobs: Sequence[Job]) -> None:
    if jobs[0].step % TIDY == 0 and _device(jobs).type == "cpu":
        give_back_freed_memory()


def validate(model: nn.Module, job: Job, record: Record, ranks: Ranks) -> None:
    """The job's loss on its validation rows, recorded and noted; nothing without such rows."""
    if not job.validation:
        return
    started = time.perf_counter()
    sums = torch.zeros(3, dtype=torch.float64)
    for group in streams_of(job.validation, STREAM * ranks.world):
        rows = ranks.share(group) or [job.objective.nothing]
        # All rows in one pass: every process must make as many.
        sums += job.objective.judged(model, rows, job.slot, sys.maxsize)
    total, terms, right = ranks.sum_(sums.to(_device([job]))).tolist()
    loss = total / terms
    if math.isfinite(loss):
        job.note_validation(loss)
    seconds = time.perf_counter() - started
    facts = {"split": "eval", "step": job.step, "loss": loss, "targets": int(terms), "seconds": seconds}
    record(job, facts | job.objective.facts(right, terms))


def _device(jobs: Sequence[Job]) -> torch.device:
    return jobs[0].flat.values_P.device
