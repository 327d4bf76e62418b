"""kill -9 at random moments: the resumed run ends in the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from veneer.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = 100
TRAIN = """
import json, sys
from veneer.config import RunConfig
from veneer.train.run import train
train(RunConfig.from_flat(json.loads(sys.argv[1])), resume=sys.argv[2] == "True", progress=False)
"""


def _start(config: RunConfig, resume: bool) -> subprocess.Popen:
    command = [sys.executable, "-c", TRAIN, json.dumps(config.to_flat()), str(resume)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def _last_step(config: RunConfig) -> int:
    """Of the last whole line of metrics.jsonl; 0 where there is none."""
    file = Path(config.output_dir, "metrics.jsonl")
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _run_until(config: RunConfig, step: int, resume: bool) -> None:
    """Kills the run once it has come to `step`, and a moment more: in a step, a validation or a checkpoint."""
    process = _start(config, resume)
    while _last_step(config) < step and process.poll() is None:
        time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.01))
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended before it could be killed:\n{said}"


def _finish(config: RunConfig, resume: bool) -> bytes:
    process = _start(config, resume)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return Path(config.output_dir, "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_and_resumed_is_undisturbed(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    options = {"max_steps": STEPS, "save_steps": 2, "eval_steps": 10, "lora_dropout": 0.1}
    moments = sorted(random.sample(range(3, STEPS - 10), 3))
    killed = config(output_dir=str(tmp_path / "killed"), **options)
    for number, step in enumerate(moments):
        _run_until(killed, step, resume=number > 0)
        assert not Path(killed.output_dir, "adapter_model.safetensors").exists()
    undisturbed = config(output_dir=str(tmp_path / "undisturbed"), **options)
    assert _finish(killed, resume=True) == _finish(undisturbed, resume=False), f"killed at steps {moments}"
    metrics = [json.loads(line) for line in Path(killed.output_dir, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if line["split"] == "train"] == list(range(1, STEPS + 1))
