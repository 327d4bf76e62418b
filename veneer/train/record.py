"""What a run leaves behind as it goes: metrics.jsonl, a progress bar, and the facts of the machine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.train.bars import Bar, bar
from veneer.train.job import Job
from veneer.train.trackers import Tracking

METRICS = "metrics.jsonl"


class Recorder:
    """Appends facts to metrics.jsonl and shows them; after a resume, lines beyond the checkpoint are dropped."""

    def __init__(
        self,
        output_dir: Path,
        jobs: Sequence[Job],
        progress: bool,
        writes: bool = True,
        tracking: Tracking | None = None,
    ) -> None:
        self.writes = writes  # of several processes, one
        self.tracking = tracking
        self.file = output_dir / METRICS
        self.jobs = jobs
        self._drop_lines_beyond({job.slot: job.step for job in jobs})
        self.bar: Bar | None = bar() if progress else None

    def __enter__(self) -> Recorder:
        if self.bar is not None:
            self.bar.start({job.slot: (job.step, job.total) for job in self.jobs})
        return self

    def __exit__(self, *_unused: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, job: Job, facts: dict[str, Any]) -> None:
        step = facts["step"]  # a later one may have begun
        line = {"job": job.slot, "step": step, "epoch": round(job.epoch_of(step), 4), **facts}
        if facts["split"] == "eval" or step % job.settings.logging_steps == 0 or step == job.total:
            job.history.append(line)
            self._write(line)
        self._show(job, facts)

    def _write(self, line: dict[str, Any]) -> None:
        line = {key: _finite(value) for key, value in line.items()}
        if self.writes:
            with self.file.open("a") as out:
                out.write(json.dumps(line) + "\n")
        if self.tracking is not None:
            self.tracking.log(line)

    def _show(self, job: Job, facts: dict[str, Any]) -> None:
        if self.bar is None:
            return
        validated = [line["loss"] for line in job.history if line["split"] == "eval"]
        tail = f"  validation {validated[-1]:.4f}" if validated else ""
        rate = job.tokens / job.seconds if job.seconds else 0.0
        shown = f"loss {job.last_loss:.4f}{tail}  {rate:,.0f} tokens/s"
        self.bar.update(job.slot, facts["step"], shown)

    def _drop_lines_beyond(self, steps: dict[str, int]) -> None:
        if not self.file.exists():
            return
        lines = [_parsed(text) for text in self.file.read_text().splitlines()]
        kept = [line for line in lines if line and line["step"] <= steps.get(line["job"], 0) and any(steps.values())]
        if self.writes:
            partial = self.file.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self.file)  # a kill here must not lose the history
        for job in self.jobs:
            job.history += [line for line in kept if line["job"] == job.slot]


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory in use so far: the allocator's on CUDA, the process's on the CPU; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss: a process started by a larger one inherits that one's peak
        high = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
        return int(high.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> dict[str, Any]:
    """Hardware and versions that a figure of this run depends on."""
    import platform

    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _parsed(text: str) -> dict[str, Any] | None:
    """A line of metrics; None for one that a crash cut short."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
