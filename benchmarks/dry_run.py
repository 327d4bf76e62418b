"""What `veneer train --dry-run` predicts, and what the run then takes: `python -m benchmarks.dry_run`.

Three settings on SmolLM2-135M, CPU: as it comes, but for the number of steps and of validation rows; the base in NF4;
long rows with every layer computed twice. Prediction and run are processes of their own, on the command line. Time
depends on what else the machine does; memory does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record

DATA = record.ROOT / os.environ.get("VENEER_DATA", "../shared/data")
WANTED = 0.15  # of the measured peak, that a prediction may be off
E2E, DOLLY = "e2e_nlg/train.jsonl", "instruct/dolly_train.jsonl"
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"dataset": E2E, "max_steps": 60, "validation_split": 32},
    "nf4 base": {"dataset": E2E, "max_steps": 20, "validation_split": 32, "load_in_4bit": True},
    "long rows, recomputed": {
        "dataset": DOLLY,
        "max_steps": 16,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 4,
        "validation_split": 16,
    },
}


def main() -> None:
    """Measures every setting and writes benchmarks/results/dry_run.json."""
    if not DATA.is_dir():
        sys.exit(f"no data at {DATA}; set VENEER_DATA to the folder that holds {E2E}")
    rows = {name: compared(options) for name, options in SETTINGS.items()}
    record.save("dry_run", {"base_model": "smollm2", "settings": rows})
    for name, row in rows.items():
        print(f"{name}: memory {row['memory_off']:+.1%}, time {row['time_off']:+.1%}", file=sys.stderr)
    if worst := [name for name, row in rows.items() if abs(row["memory_off"]) > WANTED]:
        sys.exit(f"off by more than {WANTED:.0%}: {', '.join(worst)}")


def compared(options: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured figures of one setting, and how far the first are off, as a share of the second."""
    given = {**options, "dataset": str(DATA / options["dataset"]), "base_model": "smollm2"}
    with tempfile.TemporaryDirectory() as folder:
        words = [word for name, value in given.items() for word in _words(name, value)]
        words += ["--output-dir", str(Path(folder, "out")), "--json", "--no-progress"]
        predicted, measured = _veneer(*words, "--dry-run"), _veneer(*words)
    figures: dict[str, Any] = {}
    for name, short in (("peak_memory_bytes", "memory"), ("train_seconds", "time")):
        figures |= {name: {"predicted": predicted[name], "measured": measured[name]}}
        figures |= {f"{short}_off": round(predicted[name] / measured[name] - 1, 4)}
    between = {"train_seconds_between": predicted["train_seconds_between"]}
    return {"options": options, **figures, **between, "tokens": measured["tokens"], "steps": measured["steps"]}


def _words(name: str, value: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}", str(value)]


def _veneer(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "veneer.cli", "train", *words], cwd=record.ROOT, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
