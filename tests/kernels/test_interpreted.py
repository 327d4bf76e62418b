"""The Triton kernels of the storages without a GPU: `interpreted_kernels.py` in a process of its own.

Triton looks at the switch when a kernel is defined, and with it on no kernel runs on a GPU any more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed (Linux only)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, str(Path(__file__).parent / "interpreted_kernels.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
