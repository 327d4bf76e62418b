"""metrics.jsonl: one object a line, nothing beyond the checkpoint after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from veneer.train.record import Recorder, machine, peak_memory_bytes


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _facts(step: int, loss: float = 1.5, split: str = "train") -> dict[str, Any]:
    return {"split": split, "step": step, "loss": loss, "tokens": 10, "targets": 4, "seconds": 0.5}


@pytest.fixture
def one(pico: Any, job: Any, examples: Any) -> Any:
    return job(pico, "one", examples(8), max_steps=5)


def test_a_line_a_step(one: Any, tmp_path: Path) -> None:
    with Recorder(tmp_path, [one], progress=False) as record:
        for step in (1, 2):
            record(one, _facts(step))
        record(one, _facts(2, 2.5, "eval"))
    first, _, last = _lines(tmp_path)
    assert first == {"job": "one", "step": 1, "epoch": 0.5, **_facts(1)}
    assert (last["split"], last["loss"], last["step"]) == ("eval", 2.5, 2)


def test_logging_steps_thin_the_lines(pico: Any, job: Any, examples: Any, tmp_path: Path) -> None:
    one = job(pico, "one", examples(8), max_steps=5, logging_steps=2)
    with Recorder(tmp_path, [one], progress=False) as record:
        for step in range(1, 6):
            record(one, _facts(step))
    assert [line["step"] for line in _lines(tmp_path)] == [2, 4, 5]


def test_what_is_not_finite_is_null(one: Any, tmp_path: Path) -> None:
    with Recorder(tmp_path, [one], progress=False) as record:
        record(one, _facts(1, math.nan, "eval"))
    assert _lines(tmp_path)[0]["loss"] is None


def test_a_resume_drops_what_lies_beyond(one: Any, tmp_path: Path) -> None:
    with Recorder(tmp_path, [one], progress=False) as record:
        for step in (1, 2, 3, 4):
            record(one, _facts(step))
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"job": "one", "st')  # a crash cut this line
    one.step, one.history = 2, []
    Recorder(tmp_path, [one], progress=False)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]
    assert [line["step"] for line in one.history] == [1, 2]


def test_a_run_from_the_start_drops_all(one: Any, tmp_path: Path) -> None:
    with Recorder(tmp_path, [one], progress=False) as record:
        record(one, _facts(0, 1.0, "eval"))  # step 0
    one.history = []
    Recorder(tmp_path, [one], progress=False)
    assert _lines(tmp_path) == one.history == []


def test_the_bar_goes_to_standard_error(one: Any, tmp_path: Path, capsys: Any) -> None:
    with Recorder(tmp_path, [one], progress=True) as record:
        one.last_loss = 1.25
        record(one, _facts(5))
    out, err = capsys.readouterr()
    assert out == ""
    assert "5/5" in err
    assert "loss 1.2500" in err


def test_the_machine_is_described() -> None:
    import torch

    assert machine().keys() == {"device", "threads", "torch", "transformers", "python"}
    assert peak_memory_bytes(torch.device("cpu")) > 50e6  # bytes, not kilobytes: torch alone is more
