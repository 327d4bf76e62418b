"""Full fine-tuning by the library's own loop: the same packed stream, schedule, clipping, validation and optimiser.

The library trains adapters alone; here what is trained are the model's own weights, all but those of its norms, whose
leaves give none a gradient. Weights, gradients and moments are in float32, products in bfloat16 (`torch.autocast`), as
`transformers.Trainer(bf16=True)` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SLOT = "full"


class Whole(nn.Module):
    """What stands for a method in a job: parameters that are the model's own."""

    dropout = 0.0

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameters)


def train(model: Any, data: Any, settings: Any, rate: float) -> Any:
    """The job after its last step, its best weights in `model` (in float32 before, like here)."""
    from veneer.model.packed import wiring_of
    from veneer.train.job import Job
    from veneer.train.loop import loop

    norms = [module.weight for module in model.modules() if "RMSNorm" in type(module).__name__]
    own = [one for one in model.parameters() if not any(one is norm for norm in norms)]
    for parameter in own:
        parameter.requires_grad_(True)
    wiring_of(model).slots.append(SLOT)  # nobody speaks there but the base
    job = Job(SLOT, settings, data.train, data.validation, rate, {"": Whole(own)})
    job.objective.loss = cross_entropy
    # Cached casts would be those of weights before their last update.
    with torch.autocast(model.device.type, dtype=torch.bfloat16, cache_enabled=False):
        loop(model, [job], record=lambda job, facts: job.history.append(facts), save=lambda _: None)
    wiring_of(model).slots.remove(SLOT)
    return job


def cross_entropy(model: nn.Module, stream: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """As `veneer.model.losses.cross_entropy`, through a head that learns."""
    from veneer.model.head import head_of
    from veneer.model.packed import hidden_states

    hidden_MD = hidden_states(model).index_select(0, targets.rows_M)
    logits_MV = head_of(model)(hidden_MD).float()
    nll_M = nn.functional.cross_entropy(logits_MV, targets.tokens_M, reduction="none")
    zeros = torch.zeros(len(stream.sequences), device=nll_M.device)
    sums_N = zeros.index_add(0, targets.sequences_M, nll_M)
    return sums_N, zeros.index_add(0, targets.sequences_M, torch.ones_like(nll_M))
