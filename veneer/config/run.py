"""The settings of a training run: the base, the low-rank update, the data, the optimisation."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.data import DataSettings
from veneer.config.orthogonal import OrthogonalToSettings
from veneer.config.settings import Settings
from veneer.config.storage import StorageSettings
from veneer.config.values import (
    Alphas,
    Folder,
    ModelName,
    Names,
    Optim,
    Positive,
    Ranks,
    RateOrAuto,
    Recompute,
    Seed,
    StepsOrUnlimited,
    Targets,
    Text,
    TokenIds,
    Trackers,
)

Start = Literal["kaiming", "gaussian", "pissa", "pissa_niter_16", "milora", "olora"]


class LoraSettings(Settings):
    """LoRA (arXiv:2106.09685): W + s·B·A with s = lora_alpha / r unless said otherwise; DoRA (arXiv:2402.09353)."""

    group: ClassVar[str] = "Low-rank update"

    method: Literal["lora", "dora"] = Field(
        default="lora", description="kind of update; dora learns a magnitude for each output beside B·A"
    )
    r: int = Field(default=16, ge=1, description="rank of the update of each layer")
    lora_alpha: float = Field(default=32.0, gt=0, description="the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the update's inputs dropped in training")
    use_rslora: bool = Field(default=False, description="scale by lora_alpha / sqrt(r) instead")
    scale: float | None = Field(default=None, gt=0, description="the scale itself; wins over lora_alpha and use_rslora")
    init_lora_weights: Start = Field(
        default="kaiming",
        description="start of A, with B at zero; or of both by the weight's SVD (pissa, milora) or QR (olora), kept as "
        "an anchor: the adapter is saved at twice the rank",
    )
    target_modules: Targets = Field(
        default="all-linear",
        description="layers to adapt, by name or end of name; embed_tokens and lm_head only where they are named",
    )
    target_parameters: Names = Field(
        default=[], description="experts to adapt besides, each with a rank of its own: mlp.experts.gate_up_proj"
    )
    exclude_modules: Names = Field(default=[], description="layers to leave out of target_modules")
    rank_pattern: Ranks = Field(default={}, description="other ranks for some layers")
    alpha_pattern: Alphas = Field(default={}, description="other lora_alpha for some layers")
    trainable_token_indices: TokenIds = Field(
        default=[],
        description="ids of tokens whose rows of the embedding are trained whole (and of the head, where it is tied to "
        'it); or of both: {"embed_tokens": [N], "lm_head": [N]}',
    )
    add_tokens: Names = Field(
        default=[],
        description="words that become tokens, their rows of embedding and head trained: <tool>,</tool>; the adapter "
        "carries them",
    )

    @model_validator(mode="after")
    def _one_start(self) -> LoraSettings:
        if self.method == "dora" and self.init_lora_weights not in ("kaiming", "gaussian"):
            told = {"start": self.init_lora_weights}
            raise PydanticCustomError("dora_start", "`method` dora does not go with `init_lora_weights` {start}", told)
        return self

    def scale_at(self, rank: int, alpha: float) -> float:
        """s of W + s·B·A, for a layer of this rank and lora_alpha."""
        return self.scale if self.scale is not None else alpha / (rank**0.5 if self.use_rslora else rank)


class TrainSettings(Settings):
    """Optimisation by AdamW, evaluation, checkpoints."""

    group: ClassVar[str] = "Training"

    loss: Literal["cross_entropy", "dpo"] = Field(
        default="cross_entropy",
        description="what is minimised; dpo: of pairs `chosen` and `rejected`, against the base (arXiv:2305.18290)",
    )
    beta: float = Field(default=0.1, gt=0, description="of dpo: the larger, the nearer answers stay to the base's")
    learning_rate: RateOrAuto = Field(
        default=None, description="peak learning rate; default: from the base's width and the scale, said aloud"
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
    loraplus_lr_ratio: float = Field(
        default=1.0, ge=1, description="LoRA+: B learns at this many times the rate of A; 16 in its paper"
    )
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
        if self.loraplus_lr_ratio != 1:
            others.append("`loraplus_lr_ratio` (give 1)")
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


class HubNameSettings(Settings):
    """Where an adapter goes on the Hugging Face Hub."""

    group: ClassVar[str] = "Upload"

    hub_model_id: Text | None = Field(
        default=None, description="name on the Hugging Face Hub, as me/skill; default: the folder's own"
    )
    hub_private_repo: bool = Field(default=False, description="seen by its owner alone")


class HubSettings(HubNameSettings):
    """Whether the trained adapter is uploaded, and where to."""

    push_to_hub: bool = Field(
        default=False, description="upload the trained adapter, with a model card, to the Hugging Face Hub"
    )

    @model_validator(mode="after")
    def _upload_is_asked_for(self) -> HubSettings:
        names = [name for name in ("hub_model_id", "hub_private_repo") if getattr(self, name)]
        if names and not self.push_to_hub:
            reason = {"names": " and ".join(f"`{name}`" for name in names)}
            raise PydanticCustomError("no_upload", "{names} without `push_to_hub`: nothing would be uploaded", reason)
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
    data: DataSettings
    lora: LoraSettings = Field(default_factory=LoraSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    orthogonal: OrthogonalToSettings = Field(default_factory=OrthogonalToSettings)
    hub: HubSettings = Field(default_factory=HubSettings)
    reporting: ReportingSettings = Field(default_factory=ReportingSettings)

    @model_validator(mode="after")
    def _the_base_can_read_it(self) -> RunConfig:
        if self.lora.add_tokens and self.train.loss == "dpo":
            raise PydanticCustomError(
                "reference",
                "`add_tokens` does not go with `loss` dpo, whose reference is the base, which cannot read them; teach "
                "them with `loss` cross_entropy, merge that into the base, and train on pairs from there",
            )
        return self

    @model_validator(mode="after")
    def _can_be_orthogonal(self) -> RunConfig:
        if not self.orthogonal.orthogonal_to:
            return self
        others = []
        if self.lora.method != "lora":
            others.append(f"`method` {self.lora.method}, which also changes what A does not read (give lora)")
        if self.lora.init_lora_weights not in ("kaiming", "gaussian"):
            others.append(f"`init_lora_weights` {self.lora.init_lora_weights}, which is kept in A (give kaiming)")
        if self.train.optimizer_in_bwd:
            others.append("`optimizer_in_bwd`, which updates before the term is added (leave it out)")
        if self.orthogonal.orthogonal_data and self.train.fsdp:
            others.append("`fsdp` where `orthogonal_data` is read before the base is shared out (leave either out)")
        if os.path.realpath(self.output_dir) in map(os.path.realpath, self.orthogonal.orthogonal_to):
            others.append("itself as `output_dir` (give another)")
        if others:
            reason = {"names": " and ".join(others)}
            raise PydanticCustomError("orthogonal", "`orthogonal_to` does not go with {names}", reason)
        return self

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
