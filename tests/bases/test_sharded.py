"""Every storage under FSDP2, two processes on the CPU: packed tensors are split, gathered ones act as before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo")
def test_split_by_fsdp2(tmp_path):
    """Both output and gradient, see sharded_bases.py."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    script = str(HERE / "sharded_bases.py")
    ran = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in ran]
    finally:
        for process in ran:
            process.kill()
    assert [process.returncode for process in ran] == [0, 0], "\n".join(said)[-8000:]
