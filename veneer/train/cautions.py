"""Settings that are known to hurt: what was set, what is known of it, and what to set instead.

Nothing here is about a default, and nothing is forbidden: a run goes on as it was asked to.
Sources: "LoRA Without Regret" (Schulman et al. 2025) and the sweeps of its cookbook; PEFT's method comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from veneer.config import LoraSettings, RunConfig

LOW_RATE, HIGH_RATE = 5e-5, 3e-3
LARGE_BATCH, GOOD_BATCH = 64, 32
LARGE_SCALE = 8
WIDEST = 256  # ranks beyond it are not advised: nothing was measured there


class Facts(NamedTuple):
    """What the rules ask of a run beside its settings."""

    adapted: Sequence[str]  # paths of the layers with an adapter
    trainable_parameters: int
    rows: int
    trained_tokens: int  # of one pass over the data
    usual_rate: float  # what the rule of `schedule.choose_rate` gives for this base and run


class Caution(NamedTuple):
    """One setting, what is known of it, and what to set instead."""

    option: str
    evidence: str
    instead: str

    def __str__(self) -> str:
        return f"{self.option}: {self.evidence}; next: {self.instead}"


def cautions(config: RunConfig, facts: Facts) -> list[Caution]:
    """What is known to speak against these settings, most often nothing."""
    return [found for rule in RULES if (found := rule(config, facts)) is not None]


def _low_rate(config: RunConfig, facts: Facts) -> Caution | None:
    rate = config.train.learning_rate
    if rate is None or rate >= min(LOW_RATE, facts.usual_rate / 2):
        return None
    evidence = "as for full fine-tuning; the best rate for LoRA was found to be about ten times that"
    return Caution(f"--learning-rate {rate:g}", evidence, _usual(facts))


def _high_rate(config: RunConfig, facts: Facts) -> Caution | None:
    rate = config.train.learning_rate
    if rate is None or rate < HIGH_RATE or rate <= 2 * facts.usual_rate:
        return None
    evidence = "72 of the 80 runs that diverged in a sweep of ranks and rates on an 8B model had 3e-3"
    return Caution(f"--learning-rate {rate:g}", evidence, _usual(facts))


def _usual(facts: Facts) -> str:
    return f"--learning-rate {facts.usual_rate:g}, from this base's width and the scale, or leave it out"


def _large_batch(config: RunConfig, facts: Facts) -> Caution | None:
    train = config.train
    size, passes = train.per_device_train_batch_size, train.gradient_accumulation_steps
    rows = min(size * passes, facts.rows)
    if rows <= LARGE_BATCH:
        return None
    option = f"--per-device-train-batch-size {size} --gradient-accumulation-steps {passes}"
    evidence = f"{rows} rows a step; large batches cost LoRA more than full fine-tuning, and no rank makes up for it"
    return Caution(option, evidence, f"{GOOD_BATCH} rows a step or fewer")


def _attention_only(config: RunConfig, facts: Facts) -> Caution | None:
    if not all("attn" in path or "attention" in path for path in facts.adapted):
        return None
    evidence = (
        "only attention is adapted; at rank 256 that lost to the MLPs alone at rank 128, which is as many parameters, "
        "and adding attention to MLPs gave almost nothing"
    )
    return Caution(f"--target-modules {_targets(config.lora)}", evidence, "--target-modules all-linear")


def _targets(lora: LoraSettings) -> str:
    return lora.target_modules if isinstance(lora.target_modules, str) else ",".join(lora.target_modules)


def _little_capacity(config: RunConfig, facts: Facts) -> Caution | None:
    rank, tokens, parameters = config.lora.r, facts.trained_tokens, facts.trainable_parameters
    if rank == LoraSettings.model_fields["r"].default or parameters >= tokens:
        return None
    enough = math.ceil(rank * tokens / parameters)
    evidence = (
        f"{parameters:,} parameters for {tokens:,} trained tokens; an adapter holds about 2 bits a parameter, a token "
        "brings up to 1, and learning slows where fewer parameters than tokens are trained"
    )
    return Caution(f"--r {rank}", evidence, f"--r {min(enough, WIDEST)}")


def _large_scale(config: RunConfig, facts: Facts) -> Caution | None:
    lora = config.lora
    if config.train.learning_rate is None:  # then the rate makes up for the scale
        return None
    scale = lora.scale_at(lora.r, lora.lora_alpha)
    if not lora.use_rslora or lora.scale is not None or scale < LARGE_SCALE or scale < 2 * lora.lora_alpha / lora.r:
        return None
    evidence = (
        f"the update is scaled by {scale:.3g} instead of {lora.lora_alpha / lora.r:.3g}; at rank 64 a scale of 8 "
        "instead of 2 nearly doubled (1.9) what was forgotten"
    )
    return Caution("--use-rslora", evidence, f"leave it out, or --lora-alpha {2 * math.sqrt(lora.r):.3g}")


RULES: tuple[Callable[[RunConfig, Facts], Caution | None], ...] = (
    _low_rate,
    _high_rate,
    _large_batch,
    _attention_only,
    _little_capacity,
    _large_scale,
)
