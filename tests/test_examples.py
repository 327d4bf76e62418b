"""The examples run as they stand, here on a small model; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import digits, pico_folder  # noqa: F401
from veneer.adapter.card import Adapter

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(pico_folder: Path, digits: Path, tmp_path: Path) -> Any:  # noqa: F811
    """run(example): the JSON object that it prints."""

    def start(example: str) -> dict:
        options = {"--base-model": pico_folder, "--dataset": digits, "--output-dir": tmp_path / "out", "--max-steps": 4}
        words = [str(word) for option in options.items() for word in option]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / example), *words],
            env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout[done.stdout.index("{\n" if "{\n" in done.stdout else '{"adapter') :])

    return start


@pytest.mark.slow
@pytest.mark.parametrize("example", ["transformers_trainer.py", "trl_sft.py"])
def test_a_trainer_of_others(run: Any, tmp_path: Path, example: str) -> None:
    if example == "trl_sft.py":
        pytest.importorskip("trl", reason="the extra `compare` installs it, on Python 3.11 and later")
    found = run(example)
    assert found["logits_difference"] < 1e-5  # the scale is a power of two: nothing but the order of products
    adapter = Adapter.load(found["adapter"])
    assert adapter.card.training["steps"] == 4
    assert all(adapter.factors(module)[1].any() for module in adapter.modules())


@pytest.mark.slow
def test_the_whole_life(run: Any, tmp_path: Path) -> None:
    found = run("whole_life.py")
    assert found["metrics"]["loss"]["adapter"]["score"] < found["metrics"]["loss"]["base"]["score"]
    assert found["texts"].keys() == {"base", "adapter", "merged"}
    assert found["texts"]["merged"] == found["texts"]["adapter"]
    assert found["merge"]["logits_difference"] < 1e-5
    assert (tmp_path / "out" / "merged" / "config.json").exists()


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_is_short_and_says_how_to_run_it(example: str) -> None:
    text = (EXAMPLES / example).read_text(encoding="utf-8")
    assert f"python examples/{example}" in text
    assert len(text.splitlines()) <= 60
