"""Starts one run in a fresh process, with a fresh CUDA context, and reads its result. Whatever happens is a result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu_child import MARK
from benchmarks.gpu_rows import is_ours
from benchmarks.gpu_spec import Spec

Result = dict[str, Any]
LIMIT = 560.0  # seconds that a run may take


def run(spec: Spec, limit: float = LIMIT) -> Result:
    """The figures of a run; `oom` or `failed` with the reason otherwise. `cold`: its compilers' caches were empty."""
    caches = cache_folder(spec.system)
    cold = not caches.is_dir()
    caches.mkdir(parents=True, exist_ok=True)
    words = ["-m", "benchmarks.gpu_child", spec.to_json(), str(time.time())]
    made = read(words, environment(spec.system), limit)
    for line in made.pop("traceback", []):
        print(f"    {line}", file=sys.stderr)
    return {**made, "variant": spec.variant, "spec": spec.__dict__, "cold": cold}


def read(words: list[str], variables: Mapping[str, str] | None = None, limit: float = LIMIT) -> Result:
    """Runs `python WORDS` and reads its line `RESULT {...}`."""
    begun = time.time()
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=record.ROOT, env=variables, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s", "process_seconds": time.time() - begun}
    return {**parse(done.stdout, done.stderr, done.returncode), "process_seconds": time.time() - begun}


def parse(stdout: str, stderr: str, code: int) -> Result:
    """The last result line; a process that printed none has failed, and its last words are kept."""
    lines = [line for line in stdout.splitlines() if line.startswith(MARK)]
    if lines:
        made = dict(json.loads(lines[-1].removeprefix(MARK)))
    else:
        last = (stderr or stdout).strip().splitlines()[-12:]
        made = {"failed": f"exit code {code}: {last[-1] if last else 'no output'}", "traceback": last}
    return {name: without_folders(value) if name in ("failed", "oom") else value for name, value in made.items()}


def without_folders(text: str) -> str:
    """Where something lay on this machine means nothing to who reads the file."""
    return re.sub(r"(?:/[\w.+@-]+)+/", "", text)


def environment(system: str) -> dict[str, str]:
    """VENEER_BENCH_PEERS, a folder of packages, is put before the others for peers alone."""
    caches = cache_folder(system)
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
    }
    if not is_ours(system) and (packages := os.environ.get("VENEER_BENCH_PEERS")):
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    return variables


def cache_folder(system: str) -> Path:
    """Of compiled kernels, one for each system, kept between calls; VENEER_BENCH_CACHE names another parent."""
    default = Path(tempfile.gettempdir()) / "veneer-bench-cache"
    return Path(os.environ.get("VENEER_BENCH_CACHE", default)) / system


def worked(result: Result) -> bool:
    return "tokens_per_second" in result
