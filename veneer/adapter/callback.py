"""For transformers.Trainer and whatever is built on it (TRL's SFTTrainer): keeps the adapter of an attached model.

Trainer's own checkpoints hold the frozen base alone, under its original keys. Without this callback the trained factors
would be neither saved nor, by `resume_from_checkpoint` and `load_best_model_at_end`, put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.adapter.attach import methods_of
from veneer.adapter.card import Adapter
from veneer.adapter.experts import together
from veneer.adapter.take import take
from veneer.errors import AdapterError, listed

FOLDER = "adapter"


class AdapterCallback(TrainerCallback):
    """Saves the slot `name` into <output_dir>/adapter and into each checkpoint, with the log history on its card.

    Resumed from a checkpoint, or ended with load_best_model_at_end, it puts that checkpoint's adapter back into the
    slot: exactly where the training scale is a power of two (lora_alpha 32, r 16: it is), else to the last bit of
    float32. base_name: what the card calls the base; default: what it was loaded as.
    Raises AdapterError before the first step when no such slot is attached, or PEFT has wrapped the model.
    """

    def __init__(self, name: str = "default", base_name: str = "") -> None:
        self.name, self.base_name = name, base_name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        model = given["model"]
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(model).__mro__):
            raise AdapterError("PEFT has wrapped the attached model; leave peft_config out, veneer's adapter is on it")
        methods_of(model, self.name)  # raises when nothing is attached under this name
        if state.global_step:
            self._put_back(model, _checkpoint(args, state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._save(given["model"], state, _checkpoint(args, state), Path(args.output_dir))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._put_back(given["model"], Path(state.best_model_checkpoint))
        self._save(given["model"], state, Path(args.output_dir))

    def _save(self, model: nn.Module, state: TrainerState, *folders: Path) -> None:
        if not state.is_world_process_zero:
            return
        best = {"best_metric": state.best_metric, "best_step": state.best_global_step}
        record = {"loop": "transformers.Trainer", "steps": state.global_step, "epochs": state.epoch, **best}
        training = {**record, "log_history": state.log_history}
        adapter = take(model, self.name, base_name=self.base_name, training=training)
        for folder in folders:
            adapter.save(folder / FOLDER)

    def _put_back(self, model: nn.Module, checkpoint: Path) -> None:
        """Copies the checkpoint's factors into the slot, in place: the optimiser holds on to these tensors."""
        adapter, methods = Adapter.load(checkpoint / FOLDER), methods_of(model, self.name)
        held = together({path: adapter.of(path) for path in adapter.modules()})
        held |= {path: adapter.of(path) for path in adapter.rows()}
        saved = {path: _shapes(tensors) for path, tensors in held.items()}
        attached = {path: _shapes(method.tensors()) for path, method in methods.items()}
        differing = sorted(path for path in saved | attached if saved.get(path) != attached.get(path))
        faults = [f"{path}: checkpoint {saved.get(path)}, attached {attached.get(path)}" for path in differing]
        if faults:
            next_step = "Attach with the settings of the run that wrote it."
            raise AdapterError(listed(f"{checkpoint} holds another adapter:", faults, next_step))
        for path, method in methods.items():
            method.restore(held[path])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {kind: tuple(tensor.shape) for kind, tensor in tensors.items()}


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
