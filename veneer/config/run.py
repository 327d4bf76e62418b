"""The settings of a training run: the base, the low-rank update, the data, the optimisation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.settings import Settings
from veneer.config.storage import StorageSettings
from veneer.config.values import (
    Alphas,
    File,
    Folder,
    ModelName,
    Names,
    Optim,
    Ranks,
    RateOrAuto,
    Recompute,
    RowsOrFraction,
    Seed,
    StepsOrUnlimited,
    Targets,
    Text,
    Trackers,
)

Positive = Annotated[int, Field(ge=1)]


class LoraSettings(Settings):
    """LoRA (arXiv:2106.09685): W + s·B·A with s = lora_alpha / r unless said otherwise."""

    group: ClassVar[str] = "Low-rank update"

    r: int = Field(default=16, ge=1, description="rank of the update of each layer")
    lora_alpha: float = Field(default=32.0, gt=0, description="the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the update's inputs dropped in training")
    use_rslora: bool = Field(default=False, description="scale by lora_alpha / sqrt(r) instead")
    scale: float | None = Field(default=None, gt=0, description="the scale itself; wins over lora_alpha and use_rslora")
    init_lora_weights: Literal["kaiming", "gaussian"] = Field(
        default="kaiming", description="start of A; B starts at zero"
    )
    target_modules: Targets = Field(default="all-linear", description="layers to adapt, by name or end of name")
    exclude_modules: Names = Field(default=[], description="layers to leave out of target_modules")
    rank_pattern: Ranks = Field(default={}, description="other ranks for some layers")
    alpha_pattern: Alphas = Field(default={}, description="other lora_alpha for some layers")


class DataSettings(Settings):
    """What is trained on, and what is kept back to check it."""

    group: ClassVar[str] = "Data"

    dataset: File = Field(
        description="training rows: .jsonl, .json, .csv, .tsv or .parquet, with prompt and completion, or messages"
    )
    eval_dataset: File | None = Field(default=None, description="validation rows in a file of their own")
    validation_split: RowsOrFraction = Field(
        default=0.05,
        description="without eval_dataset: rows kept back for validation, a fraction below 1 or a number; 0 = none",
    )
    max_length: Positive = Field(default=1024, description="longest row in tokens; what is beyond is cut and counted")
    system_prompt: Text | None = Field(default=None, description="put before every conversation that has none")
    template: Literal["chat"] = Field(
        default="chat", description="how a row becomes text: the model's own chat template"
    )

    @property
    def has_validation(self) -> bool:
        """Whether any row is kept for validation."""
        return self.eval_dataset is not None or self.validation_split > 0


class TrainSettings(Settings):
    """Optimisation by AdamW, evaluation, checkpoints."""

    group: ClassVar[str] = "Training"

    learning_rate: RateOrAuto = Field(
        default=None, description="peak learning rate; default: from the base's width, said aloud"
    )
    num_train_epochs: float = Field(default=3.0, gt=0, description="passes over the data")
    max_steps: StepsOrUnlimited = Field(default=None, description="optimiser steps; wins over num_train_epochs")
    per_device_train_batch_size: Positive = Field(
        default=8, description="rows in a forward pass; torchrun's processes share them"
    )
    gradient_accumulation_steps: Positive = Field(default=1, description="forward passes to an optimiser step")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="shape after warm-up"
    )
    warmup_ratio: float = Field(default=0.1, ge=0, le=1, description="share of the steps that warm up from zero")
    warmup_steps: int | None = Field(default=None, ge=0, description="warm-up in steps; wins over warmup_ratio")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled decay of A and B")
    optim: Optim = Field(default="adamw", description="optimiser; 8-bit and paged ones come from bitsandbytes")
    max_grad_norm: float = Field(default=1.0, ge=0, description="clip the gradient's norm to this; 0 = never")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the second moment")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    seed: Seed = Field(default=0, description="of start, order, dropout and split")
    eval_steps: Positive | None = Field(default=None, description="validate every N steps; default: each epoch")
    save_steps: Positive | None = Field(
        default=None, description="write a checkpoint every N steps; default: each epoch"
    )
    save_total_limit: Positive | None = Field(default=2, description="checkpoints kept; none = all")
    logging_steps: Positive = Field(default=1, description="write metrics every N steps")
    early_stopping_patience: Positive | None = Field(
        default=None, description="stop after N validations without a better loss"
    )
    load_best_model_at_end: bool = Field(default=True, description="keep the adapter of the lowest validation loss")
    gradient_checkpointing: Recompute = Field(
        default="auto",
        description="compute activations twice: less memory, slower; auto: on a GPU in as few layers as memory allows; "
        "offload: keep what is left of them on the host",
    )
    optimizer_in_bwd: bool = Field(
        default=False,
        description="update each layer as its backward ends, and free its gradients: less memory, no clipping",
    )
    torch_compile: bool | None = Field(default=None, description="compile the layers; default: on a GPU")
    fsdp: bool = Field(default=False, description="with torchrun: each process holds a share of the base, not all")

    @model_validator(mode="after")
    def _what_needs_all_gradients(self) -> TrainSettings:
        if not self.optimizer_in_bwd:
            return self
        others = []
        if self.max_grad_norm > 0:
            others.append("`max_grad_norm` (give 0)")
        if self.gradient_accumulation_steps > 1:
            others.append("`gradient_accumulation_steps` (give 1)")
        if self.gradient_checkpointing is False:
            others.append("`gradient_checkpointing` false (leave it out)")
        if self.fsdp:
            others.append("`fsdp`")
        if others:
            reason = {"names": " and ".join(others)}
            raise PydanticCustomError("in_backward", "`optimizer_in_bwd` does not go with {names}", reason)
        return self


class ReportingSettings(Settings):
    """Where metrics go beside metrics.jsonl and report.html."""

    group: ClassVar[str] = "Reporting"

    report_to: Trackers = Field(
        default=[], description="also send metrics to tensorboard, wandb, trackio, whose package must be installed"
    )
    run_name: Text | None = Field(default=None, description="name of the run there; default: from output_dir")
    project_name: Text = Field(default="veneer", description="project there that the run belongs to")


class RunConfig(StorageSettings):
    """One training run, complete: equal settings and equal data give an equal adapter."""

    group: ClassVar[str] = "Run"

    base_model: ModelName = Field(description="hub id, local folder, GGUF file, or smollm2")
    output_dir: Folder = Field(description="folder for adapter, metrics, checkpoints and report")
    method: Literal["lora"] = Field(default="lora", description="kind of update")
    data: DataSettings
    lora: LoraSettings = Field(default_factory=LoraSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    reporting: ReportingSettings = Field(default_factory=ReportingSettings)

    @model_validator(mode="after")
    def _steps_that_can_be_skipped(self) -> RunConfig:
        if self.dtype == "float16" and self.train.optimizer_in_bwd:
            raise PydanticCustomError(
                "scaled",
                "`optimizer_in_bwd` does not go with `dtype` float16, whose steps are skipped as a whole where a "
                "gradient overflows; give `dtype` bfloat16",
            )
        return self

    @model_validator(mode="after")
    def _validation_is_there(self) -> RunConfig:
        asked = [n for n in ("early_stopping_patience", "eval_steps") if getattr(self.train, n) is not None]
        if asked and not self.data.has_validation:
            reason = {"names": " and ".join(f"`{name}`" for name in asked)}
            raise PydanticCustomError(
                "no_validation", "{names} without validation rows; give `eval_dataset` or `validation_split`", reason
            )
        return self
