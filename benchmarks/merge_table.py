"""Every merge method that needs no data, over all layers of an 8B shape: seconds and memory of the whole merge.

Eight adapters of rank 16 become one of rank 16 (`cat` keeps all 128): identities, 224 layers, the report, the new
adapter, as `veneer merge` runs it between reading and writing; a thread of arithmetic a core. Memory is what the
adapters take and the most that the process came to hold beyond what it held before the merge, over what they take.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.merge_adapters import RANK, WEIGHTS, adapters

HIDDEN, MLP, KEYS = 4096, 14336, 1024
SHAPES_8B = {  # (O, I)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
LAYERS_8B = 32
COLUMNS = f"{'method':<12} {'rank':>5} {'seconds':>8} {'CPU s':>8} {'memory':>7} {'kept':>6}"


def rows(
    methods: list[str], layers: int = LAYERS_8B, shapes: dict[str, tuple[int, int]] = SHAPES_8B
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Method -> its figures, as they are found."""
    import torch

    from veneer.errors import VeneerError

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    given = whole_adapters(layers, shapes)
    own = sum(tensor.nbytes for adapter in given for tensor in adapter.tensors.values())
    for method in methods:
        try:
            found = figures(given, method)
        except VeneerError as error:  # a method that reads data
            print(f"{method} is left out: {error}", file=sys.stderr, flush=True)
            continue
        found["memory"] = 1 + found.pop("extra_bytes") / own
        print(line(method, found), file=sys.stderr, flush=True)
        yield method, found


def figures(given: list[Any], method: str) -> dict[str, Any]:
    """One merge by that method."""
    from veneer.config.merging import SETTINGS
    from veneer.merge.apply import combine
    from veneer.merge.recipe import Recipe
    from veneer.train.allocator import give_back_freed_memory

    recipe = Recipe(method, WEIGHTS, {"rank": RANK} if "rank" in SETTINGS[method].model_fields else {})
    give_back_freed_memory()  # what the method before left
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident()
    wall, cpu = time.perf_counter(), time.process_time()
    merged, report = combine(given, recipe, progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # Linux counts what a process holds in steps of a few pages a thread: two readings may differ by that.
    extra = max(0, resident("VmHWM") - before)
    rank = max(merged.card.ranks.values())
    return {"rank": rank, "seconds": wall, "cpu_seconds": cpu, "kept": report.kept, "extra_bytes": extra}


def whole_adapters(layers: int, shapes: dict[str, tuple[int, int]]) -> list[Any]:
    """As many adapters as there are weights, on all layers."""
    from veneer.adapter.card import Adapter, Card

    named: list[dict[str, Any]] = [{} for _ in WEIGHTS]
    for i, (kind, (outputs, inputs)) in enumerate(shapes.items()):
        for layer in range(layers):
            for tensors, (a, b) in zip(named, adapters(outputs, inputs, seed=len(shapes) * layer + i), strict=True):
                tensors |= {f"model.layers.{layer}.{kind}.a": a, f"model.layers.{layer}.{kind}.b": b}
    modules = [name.removesuffix(".a") for name in named[0] if name.endswith(".a")]
    card = Card("lora", {}, dict.fromkeys(modules, 1.0), dict.fromkeys(modules, RANK))
    return [Adapter(tensors, card, copied=False) for tensors in named]


def resident(which: str = "VmRSS") -> int:
    """Bytes that the process holds; the most that it held: VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def line(method: str, found: dict[str, Any]) -> str:
    """A row under COLUMNS."""
    rank, kept, memory = found["rank"], found["kept"], found["memory"]
    return f"{method:<12} {rank:>5} {found['seconds']:>8.1f} {found['cpu_seconds']:>8.1f} {memory:>6.2f}x {kept:>6.1%}"
