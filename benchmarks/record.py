"""A benchmark's result on disk: the figures plus commit, hardware and versions.

Every figure that a document quotes is read from a file written here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("veneer", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")
MATRIX_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `benchmarks/results/<name>.json`: `result` under the provenance of this run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(provenance() | result, indent=2) + "\n", encoding="utf-8")
    return path


def provenance() -> dict[str, Any]:
    """Commit, dirty flag, date, hardware and versions of this run."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def commit() -> dict[str, Any]:
    """Commit, and whether the code differs from it. VENEER_COMMIT names it for a copy without its history, `-dirty`
    at the end where it differs."""
    named = os.environ.get("VENEER_COMMIT")
    if named:
        return {"commit": named.removesuffix("-dirty"), "dirty": named.endswith("-dirty")}
    # Results are outputs of the run: a file rewritten by the previous benchmark does not make the code dirty.
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, and the matrix instructions that decide which dtype is fast."""
    info = _proc("/proc/cpuinfo", ":")
    flags = set(info.get("flags", "").split())
    kib = int(_proc("/proc/meminfo", ":").get("MemTotal", "0 kB").split()[0])
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(kib / 2**20, 1),
        "instructions": [flag for flag in MATRIX_FLAGS if flag in flags],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        **({"gpu": found} if (found := gpu()) else {}),
    }


def gpu() -> dict[str, Any] | None:
    """Name, memory in GiB and driver of the first CUDA device; None where there is none. Makes no CUDA context."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        name, mib, driver = (part.strip() for part in done.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return None
    return {"name": name, "memory_gib": round(float(mib) / 1024, 1), "driver": driver}


def ratios(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Ratio ours / theirs of each interleaved round, and their median, least and greatest."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": median(rounds), "low": min(rounds), "high": max(rounds), "rounds": rounds}


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _proc(path: str, separator: str) -> dict[str, str]:
    """First value of each key in a /proc table; empty where there is no /proc."""
    table: dict[str, str] = {}
    if os.path.exists(path):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(separator)
            table.setdefault(key.strip(), value.strip())
    return table
