"""What a run's figures are made of."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import gpu_meter
from benchmarks.gpu_meter import WARM_UP, Meter


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Meter, "memory", lambda self: {})


def test_all_timed_steps_count_and_the_first_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, *[10.0 * n for n in range(1, WARM_UP + 1)], *[10.0 * WARM_UP + end for end in (1.0, 2.0, 6.0)]])
    meter = Meter(time.time())
    monkeypatch.setattr(gpu_meter, "_mark", lambda: (next(now),))
    meter.ready([torch.zeros(3)])
    for number in range(WARM_UP + 3):
        meter.step(torch.tensor(float(number)))
    result = meter.result(100)
    assert result["tokens_per_second"] == pytest.approx(100 / 2)  # 6 s for three steps: a pause counts
    assert result["median_step_seconds"] == 1.0
    assert result["losses"] == [float(number) for number in range(WARM_UP + 3)]
    assert result["trained"] == 3 and result["first_step_seconds"] > 0


def test_of_a_run_no_longer_than_the_warm_up_the_last_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 30.0, 40.0])
    meter = Meter(time.time())
    monkeypatch.setattr(gpu_meter, "_mark", lambda: (next(now),))
    meter.ready([])
    meter.step(1.0)
    meter.step(1.0)
    assert meter.result(100)["tokens_per_second"] == pytest.approx(10.0)
