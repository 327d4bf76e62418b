"""Dynamic loss scaling for float16 (Micikevicius et al. 2018, arXiv 1710.03740), one scale a job.

Gradients below 6e-8 are zero in float16, so the loss is multiplied before backward and the gradients are divided after
it. Where they overflow, the step is skipped and the scale halved; after 2,000 steps without that it is doubled. All of
it is decided on the device: nothing is waited for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

START, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000  # as torch.amp.GradScaler
# With a scale of 1 the gradients themselves are not finite. Above 2^24 they would have to be below float16's least
# number by as much again.
LEAST, MOST = 1.0, 2.0**24


class Scaling(NamedTuple):
    """The scale that a step was computed with, and the steps skipped before it."""

    scale: float
    skipped: int


class LossScale:
    """The scale of one job, always a power of two: multiplying by it rounds nothing."""

    def __init__(self, device: torch.device | str) -> None:
        # scale, steps since it changed, steps skipped in all: one tensor, to be read and saved at once
        self.state_3 = torch.tensor([START, 0.0, 0.0], dtype=torch.float64, device=device)

    @property
    def value(self) -> Tensor:
        """The scale, a scalar tensor in float32."""
        return self.state_3[0].float()

    def update(self, active: Tensor, overflow: Tensor) -> Tensor:
        """After a step; returns whether a lower scale could help no more. Scalar bool tensors.

        active: whether the job still trains: where not, nothing changes. overflow: gradients were not finite.
        """
        scale, good, skipped = self.state_3.unbind()
        grown = good + 1 >= INTERVAL
        better = torch.where(grown, scale * GROWTH, scale).clamp(max=MOST)
        after_good = torch.stack([better, torch.where(grown, 0.0, good + 1), skipped])
        after_bad = torch.stack([(scale * BACKOFF).clamp(min=LEAST), torch.zeros_like(good), skipped + 1])
        hopeless = active & overflow & (scale <= LEAST)
        self.state_3 = torch.where(active, torch.where(overflow, after_bad, after_good), self.state_3)
        return hopeless

    def read(self) -> Scaling:
        """Waits for the device."""
        scale, _, skipped = self.state_3.tolist()
        return Scaling(scale, int(skipped))
