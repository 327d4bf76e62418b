"""What a job minimises, by the name of its loss: in a pass, and on validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import TrainSettings
from veneer.data.examples import Example, ExamplePair, Unit
from veneer.model.dpo import dpo, pair_losses
from veneer.model.losses import Loss, cross_entropy, sequence_nll

# For a process without rows: where the base is sharded, all run a pass or none can. It trains nothing.
NOTHING = Example((0,), (False,), -1, 0)


class Objective:
    """Cross-entropy, over trained tokens; or DPO, over pairs."""

    def __init__(self, settings: TrainSettings) -> None:
        self.of_pairs, self.beta = settings.loss == "dpo", settings.beta
        self.loss: Loss = partial(dpo, beta=settings.beta) if self.of_pairs else cross_entropy

    @property
    def nothing(self) -> Unit:
        """A unit that trains nothing."""
        return ExamplePair(NOTHING, NOTHING) if self.of_pairs else NOTHING

    def judged(self, model: nn.Module, units: Sequence[Unit], slot: str, max_tokens: int) -> Tensor:
        """Summed loss, number of terms, and number of pairs whose chosen answer gained more; (3) in float64."""
        units = [unit for unit in units if unit.row >= 0] or [self.nothing]
        examples = [one for unit in units for one in unit.sequences]
        if not self.of_pairs:
            sums: Any = torch.tensor(sequence_nll(model, examples, slot, max_tokens), dtype=torch.float64).sum(0)
            return torch.cat([sums, sums.new_zeros(1)])
        losses_P, margins_P = pair_losses(model, examples, slot, self.beta, max_tokens)
        counted = torch.tensor([unit.row >= 0 for unit in units])
        return torch.stack([losses_P[counted].sum(), counted.sum().double(), (margins_P[counted] > 0).sum().double()])

    def facts(self, right: float, terms: float) -> dict[str, float]:
        """What a validation tells beside its loss."""
        return {"accuracy": right / terms} if self.of_pairs else {}
