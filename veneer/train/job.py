"""One adapter in training: its data, its settings, its optimiser. The loop runs any number of them over one base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import TrainSettings
from veneer.data.batches import Batches
from veneer.data.examples import Unit
from veneer.errors import CheckpointError, ConfigError, NonFiniteLossError, TrainingError
from veneer.methods.base import Method
from veneer.model.dropout import dropout_key
from veneer.train.objective import Objective
from veneer.train.optim import (
    FlatParameters,
    by_family,
    first_last,
    optimizer_state,
    restore_optimizer,
    set_rate,
    start_optimizer,
)
from veneer.train.orthogonal import Orthogonality
from veneer.train.parts import PartedParameters, by_layer
from veneer.train.scale import LossScale
from veneer.train.schedule import factor

# What a checkpoint keeps of a job beside its tensors.
OURS = ("values", "best", "loss_scale")  # tensors that are not the optimiser's
PROGRESS = "step tokens seconds last_loss best_loss best_step evaluations_without_gain stopped_early".split()


def total_steps(settings: TrainSettings, rows: int) -> int:
    """Optimiser steps of a whole run."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.ceil(_batches(settings, rows).steps_per_epoch * settings.num_train_epochs))


def _batches(settings: TrainSettings, rows: int) -> Batches:
    """A batch here is what one optimiser step sees: how it is cut into forward passes changes no step."""
    size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    return Batches(rows, size, settings.seed)


@dataclass
class Job:
    """What to train in one slot, and how far it has come."""

    slot: str
    settings: TrainSettings
    train: Sequence[Unit]
    validation: Sequence[Unit]
    learning_rate: float
    methods: Mapping[str, Method]  # by path: what is trained
    scaled: bool = False  # whether losses are scaled: the products are in float16
    orthogonality: Orthogonality | None = None  # to earlier adapters
    term: Tensor | None = None  # what that added to the last step's loss
    step: int = 0  # optimiser steps taken
    tokens: int = 0  # gone through training steps, and the seconds they took, over all resumptions
    seconds: float = 0.0
    last_loss: float = math.nan
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    failure: TrainingError | None = None
    best_P: Tensor | None = None
    history: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.objective = Objective(self.settings)
        self.total = total_steps(self.settings, len(self.train))
        self.batches = _batches(self.settings, len(self.train))
        if self.scaled and self.settings.optimizer_in_bwd:
            raise ConfigError(
                "optimizer_in_bwd updates layers before it is known whether a float16 step overflowed; next: bfloat16, "
                "or leave it out"
            )
        self.parted = PartedParameters(by_layer(self.methods)) if self.settings.optimizer_in_bwd else None
        self.flat = self.parted or self._flat()
        self.optimizer = start_optimizer(self.flat, self.settings)
        self.scale = LossScale(self.flat.values_P.device) if self.scaled else None
        # Whether all losses and gradients so far were; a tensor, so that the device can ask.
        self.finite = torch.tensor(True, device=self.flat.values_P.device)
        epoch = self.batches.steps_per_epoch
        self.eval_steps = self.settings.eval_steps or epoch
        self.save_steps = self.settings.save_steps or max(1, min(epoch, self.total // 8))

    def _flat(self) -> FlatParameters:
        if self.settings.loraplus_lr_ratio == 1:
            return FlatParameters(by_family(self.methods))
        return FlatParameters(*first_last(self.methods))

    @property
    def done(self) -> bool:
        return self.step >= self.total or self.stopped_early or self.failure is not None

    def epoch_of(self, step: int) -> float:
        """Epochs gone through after that many steps."""
        return step / self.batches.steps_per_epoch

    def rows(self, micro: int, later: int = 0) -> list[Unit]:
        """The examples of micro-batch `micro` of the coming step, or of one that many steps later; none where the
        epoch's last step is a short one."""
        size = self.settings.per_device_train_batch_size
        return [self.train[row] for row in self.batches.rows(self.step + later)[micro * size : (micro + 1) * size]]

    def dropout_key(self, micro: int, rank: int = 0, later: int = 0) -> int | None:
        """The key of micro-batch `micro` of that step in process `rank`; None where nothing is dropped.

        Masks are drawn for the rows that a process packs together, so more processes draw others than one does.
        """
        if not any(method.dropout for method in self.methods.values()):
            return None
        who = f"{self.slot}/process {rank}" if rank else self.slot
        step = self.step + later
        return dropout_key(self.settings.seed, who, step * self.settings.gradient_accumulation_steps + micro)

    def terms_of_step(self, later: int = 0) -> int:
        """Trained tokens of that step, over all its micro-batches: what its loss is averaged over."""
        count = self.settings.gradient_accumulation_steps
        return sum(unit.terms for micro in range(count) for unit in self.rows(micro, later))

    @property
    def rate(self) -> float:
        """The coming step's learning rate."""
        return self.learning_rate * factor(self.settings, self.step, self.total)

    def begin(self) -> None:
        """Before the coming step's forward pass."""
        self._set_rate()
        if self.parted is not None:
            self.parted.begin()

    def _set_rate(self) -> None:
        set_rate(self.optimizer, self.rate)

    def layer_ended(self, layer: nn.Module) -> None:
        """Updates what is trained in `layer`, whose backward has ended, where the settings ask for that."""
        if self.parted is not None and not self.done:
            self.finite = self.parted.step_layer(layer, self.optimizer, self.finite)

    def update(self, loss: Tensor) -> tuple[float, Tensor]:
        """Clips, steps and clears; returns the rate and the gradient's norm, a scalar tensor. Nothing is waited for.

        loss: a scalar tensor on the adapter's device. Where it or the gradient is not finite the adapter stays as it
        is, then and in every later step; `step` counts on until `fail` sets it back. Where losses are scaled a
        gradient that is not finite is one skipped step, as long as a lower scale can help.
        """
        self._set_rate()
        rate, finite = self.rate, self.finite & torch.isfinite(loss)
        if self.scale is not None:
            self.flat.grads_P.div_(self.scale.value)
        if self.orthogonality is not None:  # here, where gradients are summed over passes and processes, and unscaled
            self.term = self.orthogonality.add_gradients()
        norm, taken = self.flat.step(self.optimizer, finite, self.settings.max_grad_norm)
        self.finite = taken if self.scale is None else finite & ~self.scale.update(finite, finite & ~taken)
        self.step += 1
        self.flat.clear()
        return rate, norm

    def fail(self, step: int, loss: float, norm: float, rate: float) -> None:
        """Stops at step `step` (from 1), whose loss or gradient was not finite: `update` has left the adapter as it was
        then and since; layers updated before the fault showed aside."""
        self.step = step - 1
        micros = range(self.settings.gradient_accumulation_steps)
        rows = sorted({example.row + 1 for micro in micros for example in self.rows(micro)})[:8]
        updated = "perhaps updated in part" if self.parted else "not updated"
        self.failure = NonFiniteLossError(
            f"{self.slot}: step {step} of {self.total} gave loss {loss:g} and gradient norm {norm:g} at learning "
            f"rate {rate:.3g} (last finite loss {self.last_loss:.4g}; rows {rows} of the data). The adapter was "
            f"{updated}. Next: a lower --learning-rate (try {rate / 3:.1g}){', --dtype bfloat16' * self.scaled}, or "
            "look at these rows; the last checkpoint stands."
        )

    def note_validation(self, loss: float) -> None:
        """Keeps the best values, and stops when patience is at its end."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_without_gain = loss, self.step, 0
            if self.settings.load_best_model_at_end:
                self.best_P = self.flat.values_P.detach().clone()
            return
        self.evaluations_without_gain += 1
        patience = self.settings.early_stopping_patience
        self.stopped_early = patience is not None and self.evaluations_without_gain >= patience

    def finish(self) -> None:
        """Puts the best values back, where a validation chose them."""
        if self.best_P is not None and self.settings.load_best_model_at_end:
            self.flat.values_P.data.copy_(self.best_P)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that changes while training: tensors and plain numbers."""
        tensors, counts = optimizer_state(self.optimizer)
        tensors["values"] = self.flat.values_P.data
        if self.best_P is not None:
            tensors["best"] = self.best_P
        if self.scale is not None:
            tensors["loss_scale"] = self.scale.state_3
        return tensors, {name: getattr(self, name) for name in PROGRESS} | {"optimizer": counts}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """The inverse of `state`. Raises CheckpointError when the tensors do not fit this adapter."""
        if tensors["values"].shape != self.flat.values_P.shape:
            got, wanted = tensors["values"].numel(), len(self.flat)
            raise CheckpointError(f"the checkpoint of {self.slot!r} holds {got} parameters, this run has {wanted}")
        for name in PROGRESS:
            setattr(self, name, numbers[name])
        if self.step:
            own = {name: tensor for name, tensor in tensors.items() if name not in OURS}
            restore_optimizer(self.optimizer, own, numbers["optimizer"])
        self.flat.values_P.data.copy_(tensors["values"])
        if self.scale is not None:
            self.scale.state_3.copy_(tensors["loss_scale"])
        self.best_P = tensors["best"].to(self.flat.values_P, copy=True) if "best" in tensors else None
