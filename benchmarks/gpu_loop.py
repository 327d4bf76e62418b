"""`veneer train` itself on one GPU, on the command line: `python -m benchmarks.gpu_loop [--batch 3] [--steps 24]`.

The 8B shape with random weights from a checkpoint on disk, bf16, r = 16 on all linear layers, text in chunks
of 4,096 tokens; everything else as the command decides it. What `benchmarks.gpu_train` measures on the loop alone is
here with all that a run does: reading the files, choosing what to recompute, validating, writing the adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import gpu_process, record
from benchmarks.gpu_meter import WARM_UP
from benchmarks.peers_checkpoint import folder

SEQUENCE, SHAPE = 4096, "8b"
GIB = 2**30


def main() -> None:
    """Runs the command and writes benchmarks/results/gpu_loop.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path, default=record.RESULTS)
    asked = parser.parse_args()
    if record.gpu() is None:
        print("skipped: no CUDA device")
        return
    print(gpu_process.read(["-m", "benchmarks.peers_checkpoint", SHAPE]), file=sys.stderr)
    with tempfile.TemporaryDirectory() as where:
        made = trained(Path(where), asked.batch, asked.steps)
    record.save(
        "gpu_loop", {"shape": SHAPE, "sequence": SEQUENCE, "rank": 16, "batch": asked.batch, **made}, asked.output
    )
    print(f"{made['tokens_per_second']:,.0f} tokens/s, {made['peak_gib']:.2f} GiB")


def trained(where: Path, batch: int, steps: int) -> dict[str, Any]:
    """Figures of one run: tokens a second in the middle of the run, and of the whole command."""
    words = [sys.executable, "-m", "veneer.cli", "train", "--base-model", str(folder(SHAPE)), "--json", "--no-progress"]
    words += ["--dataset", str(text(where, batch * steps + 2)), "--output-dir", str(where / "out")]
    words += ["--max-length", str(SEQUENCE), "--per-device-train-batch-size", str(batch), "--r", "16"]
    words += ["--max-steps", str(steps), "--validation-split", "1", "--learning-rate", "1e-4"]
    begun = time.perf_counter()
    done = subprocess.run(words, cwd=record.ROOT, env=os.environ, stdout=subprocess.PIPE, check=True, text=True)
    told, seconds = json.loads(done.stdout), time.perf_counter() - begun
    lines = [json.loads(line) for line in (where / "out" / "metrics.jsonl").read_text().splitlines()]
    taken = [line["seconds"] / line["tokens"] for line in lines if line["split"] == "train"][WARM_UP:-1]
    return {
        "tokens_per_second": 1 / median(taken),
        "tokens_a_step": told["tokens"] / told["steps"],
        "peak_gib": told["peak_memory_bytes"] / GIB,
        "losses": [line["loss"] for line in lines if line["split"] == "train"],
        "command_seconds": seconds,
        "warnings": told["warnings"],
        "notes": told["notes"],
    }


def text(where: Path, documents: int) -> Path:
    """Random words, documents of SEQUENCE - 1 characters, each of which is a token; an end token comes after each."""
    draw, path = random.Random(0), where / "words.jsonl"
    letters = "etaoinshrdlu    "
    rows = [json.dumps({"text": "".join(draw.choices(letters, k=SEQUENCE - 1))}) for _ in range(documents)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
