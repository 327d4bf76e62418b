"""How the learning rate is chosen and how it moves."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from veneer.config import LoraSettings, TrainSettings
from veneer.methods.init import INITS

SHORT_RUN = 100  # optimiser steps; below it the best rate is about 1.5 times higher
FITTED_ALPHA = 32  # at which the rule was fitted, with s = alpha / r
FAR = 2  # times as much, or as little; beyond it nothing was measured
WIDTH_POWER = {"llama": 0.781, "qwen": 0.0775}


class Rate(NamedTuple):
    """A peak learning rate and why it is that."""

    value: float
    reason: str


def choose_rate(settings: TrainSettings, lora: LoraSettings, model_config: Any, steps: int) -> Rate:
    """The rate given, or the rule of 'LoRA Without Regret' (Schulman et al. 2025).

    5e-5 · 10 · (2000 / hidden)^p, p fitted on Llama (0.781) and Qwen (0.0775): ten times the best rate of full
    fine-tuning, and half as much again in runs under 100 steps. Fitted at lora_alpha 32 with s = alpha / r, where the
    best rate is the same for all ranks. At a given rank what decides is s · rate, by which Adam moves ΔW whatever the
    gradient's size; so of another scale, the rate at which s · r · rate is the same. That holds of starts with B = 0;
    others are left as they are. Layers with a rank or alpha of their own follow the common one.
    """
    if settings.learning_rate is not None:
        return Rate(settings.learning_rate, "as given")
    model_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    hidden, family = model_config.hidden_size, str(getattr(model_config, "model_type", ""))
    power = next((power for name, power in WIDTH_POWER.items() if family.startswith(name)), WIDTH_POWER["llama"])
    rate = 5e-5 * 10 * (2000 / hidden) ** power
    reason = f"for a base of width {hidden}, by the rule 5e-5 · 10 · (2000 / {hidden})^{power}"
    if settings.loss == "dpo":  # as TRL's defaults stand to each other: 1e-6 beside 2e-5, for full fine-tuning
        rate, reason = rate / 20, f"{reason} / 20 for dpo"
    if settings.loraplus_lr_ratio != 1:  # A below and B above the rate that both would have
        rate, reason = rate / settings.loraplus_lr_ratio**0.5, f"{reason} / √{settings.loraplus_lr_ratio:g} for A"
    if steps < SHORT_RUN:
        rate, reason = rate * 1.5, f"{reason} · 1.5 for a run under {SHORT_RUN} steps"
    alpha = lora.scale_at(lora.r, lora.lora_alpha) * lora.r
    anchored = INITS[lora.init_lora_weights].anchored
    if not anchored and not math.isclose(alpha, FITTED_ALPHA):
        rate, reason = rate * FITTED_ALPHA / alpha, f"{reason} · {FITTED_ALPHA} / {alpha:.3g} for the scale"
    if anchored or not 1 / FAR <= alpha / FITTED_ALPHA <= FAR:
        start = ", B = 0 at the start" if anchored else ""
        reason += f"; the rule was fitted at lora_alpha {FITTED_ALPHA} without rslora{start}, so consider a sweep"
    return Rate(float(f"{rate:.3g}"), reason)


def warmup_steps(settings: TrainSettings, total: int) -> int:
    """Steps of linear warm-up, at most all of them."""
    asked = settings.warmup_steps if settings.warmup_steps is not None else math.ceil(settings.warmup_ratio * total)
    return min(asked, total)


def factor(settings: TrainSettings, step: int, total: int) -> float:
    """The share of the peak rate at optimiser step `step` (from 0) of `total`; positive at every step."""
    warm = warmup_steps(settings, total)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, total - warm)
    if settings.lr_scheduler_type == "constant":
        return 1.0
    if settings.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress
