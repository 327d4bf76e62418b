"""What the GPU gives at best: rates of matrix products at the shapes of an 8B Llama, and of copying.

`python -m benchmarks.gpu_ceiling` prints one line `RESULT {...}`. Shares of a ceiling are taken from these figures, of
the same machine and run, never from a data sheet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.gpu_child import MARK

# (tokens, in, out): queries, up, down.
SHAPES = ((4096, 4096, 4096), (4096, 4096, 14336), (4096, 14336, 4096), (16384, 4096, 14336), (16384, 14336, 4096))


def ceiling() -> dict[str, float]:
    """TFLOP/s of the best shape in bf16 and row-scaled fp8 with fast accumulation, and TB/s read plus written."""
    return {
        "bf16_tflops": max(_rate(shape, _bf16(*shape)) for shape in SHAPES),
        "fp8_tflops": max(_rate(shape, _fp8(*shape)) for shape in SHAPES),
        "copy_tb_per_second": _copy(),
    }


def _bf16(tokens: int, into: int, out: int) -> Callable[[], object]:
    x_TI = torch.randn(tokens, into, device="cuda", dtype=torch.bfloat16)
    w_OI = torch.randn(out, into, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.mm(x_TI, w_OI.t())


def _fp8(tokens: int, into: int, out: int) -> Callable[[], object]:
    x_TI = torch.randn(tokens, into, device="cuda").to(torch.float8_e4m3fn)
    w_OI = torch.randn(out, into, device="cuda").to(torch.float8_e4m3fn)
    x_scale, w_scale = torch.ones(tokens, 1, device="cuda"), torch.ones(1, out, device="cuda")
    return lambda: torch._scaled_mm(x_TI, w_OI.t(), x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def _rate(shape: tuple[int, int, int], product: Callable[[], object]) -> float:
    tokens, into, out = shape
    return 2 * tokens * into * out / _seconds(product) / 1e12


def _copy() -> float:
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source)) / 1e12


def _seconds(work: Callable[[], object], repeats: int = 30) -> float:
    """Median time of one call, by CUDA events, after a warm-up."""
    for _ in range(5):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


if __name__ == "__main__":
    print(MARK + json.dumps(ceiling()), flush=True)
