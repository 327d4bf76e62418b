"""One run in a process of its own: `python -m benchmarks.gpu_child SPEC_JSON STARTED`. Prints one line `RESULT {...}`.

Running out of memory is a result, and so is any other failure; the exit code is 0 for both.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from typing import Any

from benchmarks.gpu_rows import SYSTEMS
from benchmarks.gpu_spec import Spec

MARK = "RESULT "


def run(spec: Spec, started: float) -> dict[str, Any]:
    """The figures of one run, or `oom` / `failed` with the reason."""
    if "unsloth" in spec.system:
        importlib.import_module("unsloth")  # before torch, whose allocator it sets, and all that it patches
    system: Any = importlib.import_module(SYSTEMS[spec.system][0])
    import torch

    from benchmarks.gpu_meter import Meter

    meter = Meter(started)
    try:
        limit(spec.cap_gib)
        moments = system.train(spec, meter, "cuda" if torch.cuda.is_available() else "cpu")
        return meter.result(spec.batch * spec.sequence, moments)
    except Exception as error:
        if out_of_memory(error):
            return {"oom": str(error).splitlines()[0], "steps_done": len(meter.marks), **meter.memory()}
        tail = traceback.format_exc().strip().splitlines()[-12:]
        return {"failed": f"{type(error).__name__}: {error}", "traceback": tail, "torch": torch.__version__}


def limit(cap_gib: float | None) -> None:
    """Bounds the caching allocator."""
    import torch

    if cap_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))


def out_of_memory(error: BaseException) -> bool:
    """torch's own error, or a library's that could not allocate."""
    import torch

    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in text for sign in ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
    )


def main() -> None:
    result = run(Spec.parse(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else time.time())
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
