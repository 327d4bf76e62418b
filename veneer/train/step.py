"""One optimiser step of every job: begun on the device, and read once it has been taken.

Between the two nothing is waited for. The device itself leaves an adapter as it is where a loss or a gradient is not
finite, and in every step begun after that one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import NonFiniteLossError
from veneer.train.feed import Feed
from veneer.train.job import Job

Record = Callable[[Job, dict], None]


class Begun(NamedTuple):
    """A step on its way."""

    asked: list[tuple[Job, dict[str, Any]]]  # what is known of each job's step beforehand
    answers: Tensor  # (jobs, 3) float64, on the host: loss, tokens, norm of the gradient
    arrived: torch.cuda.Event | None  # when they are there; None: they are


def begun(feed: Feed, jobs: Sequence[Job]) -> Begun:
    """Begins one optimiser step of every job. Jobs with fewer micro-batches than others wait for them."""
    losses = feed.ranks.sum_(feed.computed(jobs))  # over the rows of all processes, for each job
    asked, norms = [], []
    for job, loss in zip(jobs, losses[:, 0], strict=True):
        feed.ranks.sum_(job.flat.grads_P)
        facts = {"split": "train", "step": job.step + 1, "targets": job.targets_of_step()}
        rate, norm = job.update(loss)
        asked.append((job, {**facts, "learning_rate": rate}))
        norms.append(norm)
    answers = torch.cat([losses, torch.stack(norms).double().unsqueeze(1)], 1)
    there = answers.to("cpu", non_blocking=True)
    return Begun(asked, there, torch.cuda.current_stream().record_event() if answers.is_cuda else None)


class Told:
    """Reads the facts of each step and hands them to `record`; one step may be waiting."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.waiting: Begun | None = None
        self.since = time.perf_counter()  # when the step before was read, or what came after it had ended

    def later(self, step: Begun) -> None:
        """Reads the step that waits; this one waits now."""
        self.now()
        self.waiting = step

    def now(self) -> None:
        """Reads the step that waits, if one does."""
        step, self.waiting = self.waiting, None
        if step is None:
            return
        if step.arrived is not None:
            step.arrived.synchronize()
        ended = time.perf_counter()
        seconds, self.since = ended - self.since, ended
        for (job, asked), (loss, tokens, norm) in zip(step.asked, step.answers.tolist(), strict=True):
            self._tell(job, asked, loss, int(tokens), norm, seconds)

    def _tell(self, job: Job, asked: dict[str, Any], loss: float, tokens: int, norm: float, seconds: float) -> None:
        if job.failure:  # in the step before: this one has changed nothing
            return
        if not (math.isfinite(loss) and math.isfinite(norm)):
            job.step = asked["step"] - 1
            job.failure = _failure(job, loss, norm, asked["learning_rate"])
            return
        job.last_loss, job.seconds, job.tokens = loss, job.seconds + seconds, job.tokens + tokens
        facts = {"loss": loss, "learning_rate": asked["learning_rate"], "grad_norm": norm, "tokens": tokens}
        self.record(job, {**asked, **facts, "seconds": seconds})


def _failure(job: Job, loss: float, norm: float, rate: float) -> NonFiniteLossError:
    micros = range(job.settings.gradient_accumulation_steps)
    rows = sorted({example.row + 1 for micro in micros for example in job.rows(micro)})[:8]
    return NonFiniteLossError(
        f"{job.slot}: step {job.step + 1} of {job.total} gave loss {loss:g} and gradient norm {norm:g} at learning "
        f"rate {rate:.3g} (last finite loss {job.last_loss:.4g}; rows {rows} of the data). The adapter was not "
        f"updated. Next: a lower --learning-rate (try {rate / 3:.1g}), or look at these rows; the last checkpoint "
        "stands."
    )
