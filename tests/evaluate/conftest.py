"""Values that a report is made of, small but complete."""

from __future__ import annotations

import math

import pytest

from veneer.evaluate.intervals import Score
from veneer.evaluate.run import Result, Sample


@pytest.fixture
def history():
    rows = [{"step": k, "split": "train", "loss": 2.5 * math.exp(-k / 15) + 0.1} for k in range(1, 61)]
    return rows + [{"step": k, "split": "eval", "loss": 2.5 * math.exp(-k / 15) + 0.15} for k in (20, 40, 60)]


@pytest.fixture
def norms():
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    return {f"model.layers.{n}.{m}": 0.001 * (n + 1) * (k + 1) for n in range(12) for k, m in enumerate(modules)}


@pytest.fixture
def result():
    """Ten rows of each outcome, two of broken."""
    answers = {"fixed": ("no idea", "four"), "wrong": ("", "five"), "right": ("four", "four"), "broken": ("four", "x")}
    samples = [
        Sample(
            f"2 + 2, {kind} {n}",
            ("four",),
            {"base": before, "adapter": after},
            {"exact_match": {"base": float(before == "four"), "adapter": float(after == "four")}},
        )
        for kind, (before, after) in answers.items()
        for n in range(2 if kind == "broken" else 10)
    ]
    scores = {
        "exact_match": {"base": Score(0.375, 0.22, 0.53, 32), "adapter": Score(0.625, 0.47, 0.78, 32)},
        "loss": {"base": Score(2.1, 2.0, 2.25, 32), "adapter": Score(0.031, None, None, 32)},
    }
    differences = {
        "exact_match": {"adapter": Score(0.25, 0.05, 0.45, 32)},
        "loss": {"adapter": Score(-2.069, -2.2, -1.9, 32)},
    }
    return Result(scores, differences, tuple(samples), 32, {"base_model": "tiny", "dataset": "test.jsonl"}, ("a note",))
