"""The micro-batches of a step, each made ready while the one before is being computed.

Packing and copying take milliseconds of Python. On a GPU, which computes on its own, they cost nothing when they are
done before its answer is waited for: so the first micro-batch of the next step is ready when the step ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.data.chat import Example
from veneer.train.job import Job
from veneer.train.objective import NOTHING
from veneer.train.passes import Pass, Passes
from veneer.train.ranks import ALONE, Ranks

Batch = list[tuple[Job, Example]]


class Feed:
    """Computes the micro-batches of one step after another."""

    def __init__(self, passes: Passes, ranks: Ranks = ALONE) -> None:
        self.passes, self.ranks = passes, ranks
        self.ahead: tuple[list, Batch, Pass] | None = None  # of which steps, what, ready

    def computed(self, jobs: Sequence[Job]) -> Tensor:
        """Adds the gradients of this process's rows of the coming step; for each job its share of the loss and its
        tokens, (jobs, 2) in float64. On a GPU nothing has been waited for. Of jobs that scale their losses the
        gradients are scaled."""
        micros = [micro for micro in range(_micros(jobs)) if any(job.rows(micro) for job in jobs)]
        wanted = [(job.slot, job.step) for job in jobs]
        if self.ahead is not None and self.ahead[0] == wanted:
            batch, ready = self.ahead[1:]
        else:
            batch, ready = self.ready(jobs, micros[0], 0)
        parts: list[tuple[Batch, Tensor]] = []
        for following in [*micros[1:], None]:
            parts.append((batch, self.passes(_scaled(batch, ready))))
            if following is not None:
                batch, ready = self.ready(jobs, following, 0)
        self.ahead = None
        if all(job.step + 1 < job.total for job in jobs):
            self.ahead = ([(job.slot, job.step + 1) for job in jobs], *self.ready(jobs, 0, 1))
        return _sums(jobs, parts)

    def ready(self, jobs: Sequence[Job], micro: int, later: int) -> tuple[Batch, Pass]:
        """Micro-batch `micro` of the step that comes `later` steps after the coming one."""
        ranks = self.ranks
        units = [(job, unit) for job in jobs for unit in ranks.share(job.rows(micro, later))]
        units = units or [(jobs[0], jobs[0].objective.nothing)]
        batch = [(job, example) for job, unit in units for example in unit.sequences]
        keys = {job.slot: key for job in jobs if (key := job.dropout_key(micro, ranks.rank, later)) is not None}
        targets = {job.slot: job.terms_of_step(later) for job in jobs}
        sequences, trained = zip(*((example.input_ids, example.targets) for _, example in batch), strict=True)
        weights, slots = [1.0 / targets[job.slot] for job, _ in batch], [job.slot for job, _ in batch]
        return batch, self.passes.ready(sequences, trained, weights, slots, keys, jobs[0].objective.loss)


def _micros(jobs: Sequence[Job]) -> int:
    return max(job.settings.gradient_accumulation_steps for job in jobs)


def _scaled(batch: Batch, ready: Pass) -> Pass:
    """With the weights of jobs that scale their losses multiplied: only now, as the step before decides by how much."""
    if all(job.scale is None for job, _ in batch):
        return ready
    device = batch[0][0].flat.values_P.device
    one = torch.ones((), device=device)
    scales_N = torch.stack([one if job.scale is None else job.scale.value for job, _ in batch])
    return ready._replace(weights_N=ready.weights_N.to(device, non_blocking=True) * scales_N)


def _sums(jobs: Sequence[Job], parts: Sequence[tuple[Batch, Tensor]]) -> Tensor:
    places = {job.slot: place for place, job in enumerate(jobs)}
    device = parts[0][1].device
    sums = torch.zeros(len(jobs), 2, dtype=torch.float64, device=device)
    for batch, losses_N in parts:
        rows_N = _to_device([places[job.slot] for job, _ in batch], torch.int64, device)
        lengths = [len(example.input_ids) if example is not NOTHING else 0 for _, example in batch]
        sums[:, 0].index_add_(0, rows_N, losses_N.double())
        sums[:, 1].index_add_(0, rows_N, _to_device(lengths, torch.float64, device))
    for place, job in enumerate(jobs):
        if job.scale is not None:
            sums[place, 0] /= job.scale.value
    return sums


def _to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on the device, for which nothing there is waited for."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
