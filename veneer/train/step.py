"""One optimiser step of every job: begun on the device, and read once it has been taken.

Between the two nothing is waited for (but by optimisers that cannot ask the device, see `step_where`). The device
itself leaves an adapter as it is where a loss or a gradient is not finite, and in every step begun after that one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.train.feed import Feed
from veneer.train.job import Job
from veneer.train.scale import LEAST

PATIENCE = 10.0  # seconds that a step may still take after an error in the next
Record = Callable[[Job, dict], None]


class PendingStep(NamedTuple):
    """A step on its way."""

    asked: list[tuple[Job, dict[str, Any]]]  # what is known of each job's step beforehand
    # (jobs, 6) float64, on the host: loss, tokens, norm of the gradient; loss scale, steps skipped; `Job.term`
    answers: Tensor
    arrived: torch.cuda.Event | None  # when they are there; None: they are


def begin_step(feed: Feed, jobs: Sequence[Job]) -> PendingStep:
    """Begins one optimiser step of every job. Jobs with fewer micro-batches than others wait for them."""
    for job in jobs:
        job.begin()
    losses = feed.ranks.sum_(feed.computed(jobs))  # over the rows of all processes, for each job
    asked, norms, scales, terms = [], [], [], []
    for job, loss in zip(jobs, losses[:, 0], strict=True):
        if job.parted is None:
            feed.ranks.sum_(job.flat.grads_P)
        facts = {"split": "train", "step": job.step + 1, "targets": job.terms_of_step()}
        used = job.scale.state_3[0] if job.scale else torch.zeros_like(loss)
        rate, norm = job.update(loss)
        asked.append((job, {**facts, "learning_rate": rate}))
        norms.append(norm)
        scales.append(torch.stack([used, job.scale.state_3[2]]) if job.scale else used.expand(2))
        terms.append(torch.zeros_like(loss) if job.term is None else job.term)
    columns = [losses, torch.stack(norms).double().unsqueeze(1), torch.stack(scales), torch.stack(terms).unsqueeze(1)]
    answers = torch.cat(columns, 1)
    there = answers.to("cpu", non_blocking=True)
    return PendingStep(asked, there, torch.cuda.current_stream().record_event() if answers.is_cuda else None)


class StepReader:
    """Reads the facts of each step and hands them to `record`; one step may be waiting."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.waiting: PendingStep | None = None
        self.last_read = time.perf_counter()  # or when the validation or checkpoint after it had ended

    def push(self, step: PendingStep) -> None:
        """Reads the step that waits; this one waits now."""
        self.flush()
        self.waiting = step

    def flush(self) -> None:
        """Reads the step that waits, if one does."""
        step, self.waiting = self.waiting, None
        if step is not None:
            if step.arrived is not None:
                step.arrived.synchronize()
            self._read(step)

    def salvage(self) -> None:
        """Reads the step that waits, after an error in the one begun after it; not where the device does not answer."""
        step, self.waiting = self.waiting, None
        end = time.monotonic() + PATIENCE
        while step is not None and step.arrived is not None and not step.arrived.query():
            if time.monotonic() > end:
                return
            time.sleep(0.01)
        if step is not None:
            self._read(step)

    def _read(self, step: PendingStep) -> None:
        ended = time.perf_counter()
        seconds, self.last_read = ended - self.last_read, ended
        for (job, asked), answer in zip(step.asked, step.answers.tolist(), strict=True):
            self._tell(job, asked, answer, seconds)

    def _tell(self, job: Job, asked: dict[str, Any], answer: list[float], seconds: float) -> None:
        loss, tokens, norm, scale, skipped, term = answer
        if job.failure:  # in the step before: this one has changed nothing
            return
        lowered = scale > LEAST  # then infinite gradients are a step skipped
        if not (math.isfinite(loss) and (math.isfinite(norm) or lowered)):
            job.fail(asked["step"], loss, norm, asked["learning_rate"])
            return
        job.last_loss, job.seconds, job.tokens = loss, job.seconds + seconds, job.tokens + int(tokens)
        facts = {"loss": loss, "learning_rate": asked["learning_rate"], "grad_norm": norm, "tokens": int(tokens)}
        scaling = {"loss_scale": scale, "skipped_steps": int(skipped)} if job.scale else {}
        apart = {"orthogonal_loss": term} if job.orthogonality else {}
        self.record(job, {**asked, **facts, **scaling, **apart, "seconds": seconds})
