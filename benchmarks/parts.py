"""A benchmark in parts, a process each, spread over the GPUs there are, and joined: `python -m benchmarks.parts
merge_quality --processes 6 --adapters out/merge-quality`.

For `merge_quality` and `merge_starts`, whose passes are too small to fill a GPU. What was measured when the time is up
is joined all the same; the next call goes on with what each part holds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record

NAMES = ("merge_quality", "merge_starts")
ENDING = 30.0  # seconds that a part which begins nothing more may take to write what it has


def main() -> None:
    """Trains the adapters that all parts need, runs the parts, joins what they wrote into one result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--adapters", type=Path, default=Path("out/merge-quality"), help="where adapters are kept")
    parser.add_argument("--folder", type=Path, default=Path("out/parts"), help="where the parts' results and words lie")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end all parts after that")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/NAME.json")
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    asked.folder.mkdir(parents=True, exist_ok=True)
    adapters, devices, running = asked.adapters.resolve(), gpus(), []
    begin = ["-m", "benchmarks.merge_quality", "--adapters", str(adapters), "--adapters-only"]
    subprocess.run([sys.executable, *begin], cwd=record.ROOT, check=True)
    outputs = [asked.folder.resolve() / f"{asked.name}-{n}.json" for n in range(1, asked.processes + 1)]
    words_of = commands(asked.name, adapters, outputs, until - time.monotonic() - ENDING)
    for place, (words, output) in enumerate(zip(words_of, outputs, strict=True)):
        with output.with_suffix(".log").open("w") as log:
            environment = variables(place, devices, asked.processes)
            running.append(
                subprocess.Popen([sys.executable, *words], cwd=record.ROOT, env=environment, stdout=log, stderr=log)
            )
    failed = [output for one, output in zip(running, outputs, strict=True) if not ended(one, until)]
    for output in failed:
        print(f"{output.name} did not end well; its last words: {last_words(output)}", file=sys.stderr)
    found = [str(output) for output in outputs if output.exists()]
    target = ["--output", str(asked.output.resolve())] if asked.output else []
    join = ["-m", f"benchmarks.{asked.name}", "--join", *found, *target]
    subprocess.run([sys.executable, *join], cwd=record.ROOT, check=True)
    sys.exit(1 if failed else 0)


def commands(name: str, adapters: Path, outputs: Sequence[Path], seconds: float) -> list[list[str]]:
    """The words of every part's process. merge_starts writes after each start, and knows no time."""
    shared = ["-m", f"benchmarks.{name}", "--adapters", str(adapters)]
    if name == "merge_quality" and seconds < float("inf"):
        shared += ["--seconds", f"{max(0.0, seconds):.0f}"]
    return [[*shared, "--part", f"{n}/{len(outputs)}", "--output", str(output)] for n, output in enumerate(outputs, 1)]


def variables(place: int, devices: int, processes: int) -> dict[str, str]:
    """The part's GPU, in turns, and its share of the cores."""
    cores = max(1, (os.cpu_count() or 1) // processes)
    shown = {"CUDA_VISIBLE_DEVICES": str(place % devices)} if devices else {}
    return {**os.environ, "OMP_NUM_THREADS": str(min(4, cores)), **shown}


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


def ended(process: subprocess.Popen[bytes], until: float) -> bool:
    """Whether it ended by itself and without a fault; it is ended where it does not."""
    try:
        return process.wait(max(0.0, until - time.monotonic()) if until < float("inf") else None) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def last_words(output: Path) -> str:
    lines = output.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "none"


if __name__ == "__main__":
    main()
