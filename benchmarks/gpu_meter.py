"""What is measured inside a run's process: time between the ends of steps, and memory as three parties see it."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import record

# First steps that are not timed: compiling, choosing kernels, the optimiser's first allocation, recording a graph.
WARM_UP = 3
GIB = 2**30
EVERY = 0.02  # seconds between samples of the driver's figure
PEERS = ("bitsandbytes", "liger-kernel", "peft", "torch", "torchao", "transformers", "triton", "unsloth", "unsloth-zoo")


class Meter:
    """Told when a system is ready and when each of its steps has ended; `result` is what the driver gets."""

    def __init__(self, started: float) -> None:
        self.started = started  # time.time() at which the driver started this process
        self.driver = DriverMemory()
        self.marks: list[Any] = []  # of each step, see `_mark`
        self.losses: list[float | Tensor] = []
        self.facts: dict[str, Any] = {}
        self.begun = 0.0
        self.start: Any = None
        self.first_step_peak = 0  # bytes; the optimiser's moments come only after it

    def ready(self, trained: Sequence[Tensor], **facts: Any) -> None:
        """The model stands, adapters and optimiser too; the first step comes next."""
        settle(empty=True)
        self.facts = {
            "trained": sum(tensor.numel() for tensor in trained),
            "trained_dtypes": dtypes(trained),
            "idle_gib": torch.cuda.memory_allocated() / GIB,
            "build_peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
            "ready_seconds": time.time() - self.started,
            **facts,
        }
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.begun, self.start = time.perf_counter(), _mark()

    def step(self, loss: float | Tensor) -> None:
        """A step has been launched, up to its optimiser; nobody waits for it here, but for the first."""
        self.mark()
        self.losses.append(loss)

    def mark(self) -> None:
        """The end of a step, on the device's own clock: all that was launched so far is the step's, or an earlier's."""
        self.marks.append(_mark())
        if len(self.marks) == 1:
            settle()
            self.facts["first_step_seconds"] = time.perf_counter() - self.begun
            self.facts["start_to_first_step_seconds"] = time.time() - self.started
            self.first_step_peak = _peak()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    def result(self, tokens_per_step: int, moments: Sequence[Tensor] = ()) -> dict[str, Any]:
        """All figures of the run; of one no longer than the warm-up, its last step is what is timed."""
        settle()
        seconds = [_between(before, after) for before, after in pairwise([self.start, *self.marks])]
        timed = seconds[WARM_UP:] or seconds[-1:]
        return {
            "tokens_per_second": tokens_per_step * len(timed) / sum(timed),
            "step_seconds": sum(timed) / len(timed),
            "median_step_seconds": median(timed),
            "all_step_seconds": seconds,
            "losses": [float(loss) for loss in self.losses],
            **self.facts,
            "moment_dtypes": dtypes(moments),
            **self.memory(),
            "versions": versions(),
        }

    def memory(self) -> dict[str, float]:
        """Peaks in GiB since `ready`: of the allocator's tensors, of what it holds, and of the driver's own count."""
        return {
            "peak_gib": max(self.first_step_peak, _peak()) / GIB,
            "first_step_peak_gib": (self.first_step_peak or _peak()) / GIB,
            "later_peak_gib": _peak() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            "driver_gib": self.driver.peak() / GIB,
            "host_gib": _host_peak_kib() / 2**20,
        }


def _peak() -> int:
    """Bytes of tensors, at most, since this was last reset."""
    return torch.cuda.max_memory_allocated()


def _mark() -> Any:
    """A point in time on the device's own clock; without a device, on ours."""
    if not torch.cuda.is_available():
        return (time.perf_counter(),)
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    """Seconds from one mark to another."""
    return after[0] - before[0] if isinstance(after, tuple) else before.elapsed_time(after) / 1e3


class DriverMemory:
    """The most device memory in use, beyond what was before this process touched the device; sampled by a thread."""

    def __init__(self) -> None:
        self._read = _nvml()
        self._before = self._read() if self._read else 0
        self._most = self._before
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def peak(self) -> int:
        """Bytes."""
        self._sample()
        return self._most - self._before

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            self._sample()

    def _sample(self) -> None:
        if self._read:
            self._most = max(self._most, self._read())
        elif torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            self._most = max(self._most, total - free)


def _nvml() -> Any:
    """A function that reads the used bytes of the device from NVML, or None where that is not installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except Exception:  # not installed, no driver, or a device that NVML may not read
        return None
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def settle(empty: bool = False) -> None:
    """Waits for the device; with `empty`, gives back what the allocator holds unused. Nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if empty:
            torch.cuda.empty_cache()


def dtypes(tensors: Sequence[Tensor]) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def versions() -> dict[str, str]:
    """Of the packages that this process could import."""
    found = {name: record.version(name) for name in PEERS}
    return {"python": platform.python_version(), **{name: value for name, value in found.items() if value}}


def _host_peak_kib() -> int:
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0
