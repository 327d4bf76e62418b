"""Whether Triton is installed: it comes with torch for CUDA on Linux, and not everywhere else."""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def has_triton() -> bool:
    """Whether kernels written in Triton can be imported."""
    return importlib.util.find_spec("triton") is not None
