"""The learning rate: where it starts from and how it moves."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.config import LoraSettings, TrainSettings
from veneer.train.schedule import choose_rate, factor, warmup_steps

KINDS = ("linear", "cosine", "constant")


def _shape(kind: str, total: int, **given: float) -> list[float]:
    settings = TrainSettings(lr_scheduler_type=kind, **given)
    return [factor(settings, step, total) for step in range(total)]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.853553, 0.5, 0.146447]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_shapes_by_hand(kind: str, wanted: list[float]) -> None:
    assert _shape(kind, 4, warmup_steps=0) == pytest.approx(wanted, abs=1e-6)
    # three steps of warm-up come first, evenly spaced to the peak, and the shape is stretched over what is left
    assert _shape(kind, 7, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, *wanted], abs=1e-6)


def test_lora_plus_begins_below_and_ends_above_the_rate_of_both() -> None:
    model = SimpleNamespace(hidden_size=2000, model_type="llama")
    both = choose_rate(TrainSettings(), LoraSettings(), model, 1000)
    apart = choose_rate(TrainSettings(loraplus_lr_ratio=16), LoraSettings(), model, 1000)
    assert both.value == 5e-4 and apart.value == 5e-4 / 4 and "√16" in apart.reason


@given(st.sampled_from(KINDS), st.integers(1, 300), st.floats(0, 1), st.none() | st.integers(0, 400))
def test_always_positive_peaks_once_and_never_above(kind: str, total: int, ratio: float, steps: int | None) -> None:
    settings = TrainSettings(lr_scheduler_type=kind, warmup_ratio=ratio, warmup_steps=steps)
    warm = warmup_steps(settings, total)
    values = [factor(settings, step, total) for step in range(total)]
    assert all(0 < value <= 1 for value in values)
    assert values[:warm] == sorted(values[:warm])
    assert values[warm:] == sorted(values[warm:], reverse=True)
    assert warm == total or values[warm] == 1.0


def test_warmup_steps_win_over_the_ratio_and_end_with_the_run() -> None:
    assert warmup_steps(TrainSettings(warmup_ratio=0.03), 100) == 3
    assert warmup_steps(TrainSettings(warmup_ratio=0.03), 10) == 1
    assert warmup_steps(TrainSettings(warmup_ratio=0.5, warmup_steps=0), 100) == 0
    assert warmup_steps(TrainSettings(warmup_steps=500), 100) == 100


def _rate(hidden: int, family: str, steps: int = 1000, lora: dict | None = None, **given: float) -> tuple[float, str]:
    model = SimpleNamespace(hidden_size=hidden, model_type=family)
    return choose_rate(TrainSettings(**given), LoraSettings(**(lora or {})), model, steps)


def test_the_rule_by_hand() -> None:
    assert _rate(2000, "llama")[0] == pytest.approx(5e-4)
    assert _rate(576, "llama")[0] == pytest.approx(5e-4 * (2000 / 576) ** 0.781, rel=5e-3)  # rounded to three digits
    assert _rate(4096, "qwen2")[0] == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775, rel=5e-3)
    assert _rate(576, "llama", steps=99)[0] == pytest.approx(1.5 * _rate(576, "llama", steps=100)[0], rel=5e-3)


def test_a_given_rate_is_taken_as_given() -> None:
    assert _rate(576, "llama", learning_rate=3e-4) == (3e-4, "as given")


def test_the_reason_names_numbers_and_doubts() -> None:
    assert _rate(576, "llama")[1].startswith("for a base of width 576, by the rule 5e-5")
    assert "under 100 steps" in _rate(576, "llama", steps=10)[1]
    assert "sweep" not in _rate(576, "llama")[1]
    assert "sweep" not in _rate(576, "llama", lora={"lora_alpha": 16})[1]
    for lora in ({"lora_alpha": 8}, {"use_rslora": True}, {"scale": 16.0}, {"init_lora_weights": "pissa"}):
        assert "sweep" in _rate(576, "llama", lora=lora)[1]


def test_the_scale_by_hand() -> None:
    """Half of lora_alpha, twice the rate; rsLoRA at rank 64 has eight times the scale; starts of B ≠ 0 are left."""
    assert _rate(2000, "llama", lora={"lora_alpha": 16})[0] == pytest.approx(1e-3)
    assert _rate(2000, "llama", lora={"use_rslora": True, "r": 64})[0] == pytest.approx(6.25e-5)
    assert _rate(2000, "llama", lora={"scale": 1.0, "r": 32})[0] == pytest.approx(5e-4)
    assert _rate(2000, "llama", lora={"lora_alpha": 16, "init_lora_weights": "pissa"})[0] == pytest.approx(5e-4)


@given(st.integers(1, 512), st.floats(1, 512), st.booleans(), st.none() | st.floats(0.1, 64))
def test_the_update_moves_as_fast_at_every_scale(r: int, alpha: float, rslora: bool, scale: float | None) -> None:
    lora = LoraSettings(r=r, lora_alpha=alpha, use_rslora=rslora, scale=scale)
    rate, reason = _rate(576, "llama", lora=lora.model_dump())
    usual = _rate(576, "llama", lora={"r": r})[0]
    # both rounded to three digits
    assert rate * lora.scale_at(r, alpha) == pytest.approx(usual * 32 / r, rel=1e-2)
    assert ("for the scale" in reason) == (not math.isclose(lora.scale_at(r, alpha) * r, 32))
