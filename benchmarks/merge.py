"""Merging without dense matrices, against PEFT, and every method over a large model: `python -m benchmarks.merge`.

Eight adapters of rank 16 into one of rank 16, one linear layer, mixed weights, one thread; in turns: ours (`svd`), ours
by Householder QR in float64 (`exact`), PEFT's `add_weighted_adapter(combination_type="svd")` on a model of that layer,
and the same dense sum with torch.svd_lowrank in the place of the SVD, which is what a careful user might write. The
error of each is its distance to the best rank 16 of the float64 sum, as a share of it. PEFT takes about 20 s a layer of
4096 x 4096: `--sizes 2048` leaves that out.

Then all methods that need no data, on all 224 layers of an 8B shape, on all cores (`merge_table`); `--methods svd,ties`
takes some of them, `--methods none` leaves this out. Six minutes on two idle cores; what is found is written as it is
found. Beside other work the figures are not worth keeping, so the load before the run is written with them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import merge_table, record
from benchmarks.merge_adapters import RANK, WEIGHTS, adapters

ADAPTERS = len(WEIGHTS)
TURN = 0.25  # seconds of a system at a time


def main(words: Sequence[str] | None = None) -> None:
    """Runs all systems in turns and writes benchmarks/results/merge.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2048,4096")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default="all")
    asked = parser.parse_args(words)
    import torch

    from veneer.merge.table import MERGES

    torch.set_num_threads(1)
    result: dict[str, Any] = {"adapters": ADAPTERS, "rank": RANK, "load_before": os.getloadavg()[0]}
    result |= {"layers": {}, "model_8b": {}}
    for size in map(int, asked.sizes.split(",")):
        result["layers"][size] = layer(size, asked.rounds)
        record.save("merge", result)
    methods = {"all": list(MERGES), "none": []}.get(asked.methods, asked.methods.split(","))
    for method, found in merge_table.rows(methods) if methods else ():
        result["model_8b"][method] = found
        record.save("merge", result)
    print(told(result))


def told(result: dict[str, Any]) -> str:
    """The result as text: a line for each system and size, and the table of methods."""
    lines = [f"{'layer':<12} {'system':<14} {'ms':>9} {'PEFT takes':>11} {'error':>9}"]
    for size, found in result["layers"].items():
        for name, seconds in found["seconds"].items():
            milliseconds, times = 1000 * seconds["median"], found["peft_over"][name]["median"]
            lines.append(
                f"{size}²".ljust(13) + f"{name:<14} {milliseconds:>9.1f} {times:>10.0f}x {found['error'][name]:>9.1e}"
            )
    lines += ["", merge_table.COLUMNS] if result["model_8b"] else []
    return "\n".join(lines + [merge_table.line(method, found) for method, found in result["model_8b"].items()])


def layer(size: int, rounds: int) -> dict[str, Any]:
    """Seconds of every system in every round, the ratios to PEFT, and the errors."""
    updates = adapters(size, size, seed=0)
    systems: dict[str, Callable[[], Any]] = {
        "veneer": lambda: ours(updates),
        "veneer_exact": lambda: ours(updates, exact=True),
        "peft_svd": peft_svd(updates),
        "svd_lowrank": lambda: dense_lowrank(updates),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    products = {}
    ours(updates)  # the first call loads libraries
    for _ in range(rounds):
        for name, run in systems.items():
            taken, products[name] = timed(run)
            seconds[name].append(taken)
            print(f"{size} x {size}, {name}: {seconds[name][-1]:.4f} s", file=sys.stderr, flush=True)
    return {
        "seconds": {name: {"median": median(taken), "rounds": taken} for name, taken in seconds.items()},
        "error": errors(updates, products),
        "peft_over": {name: record.ratios(seconds["peft_svd"], seconds[name]) for name in systems},
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, the mean of as many as fit into TURN, and what it returns: a layer follows a layer."""
    begun, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - begun < TURN:
        product, calls = run(), calls + 1
    return (time.perf_counter() - begun) / calls, product


def ours(updates: list[tuple[Any, Any]], exact: bool = False) -> Any:
    """b, a of the merge method `svd`, as the verb would call it."""
    from veneer.config.merging import SvdSettings
    from veneer.merge.layer import merge_layer
    from veneer.merge.method import Parent
    from veneer.merge.table import merge_named

    merge, options = merge_named("svd"), SvdSettings(rank=RANK, exact=exact)
    parents = [Parent(a, b, w, str(i)) for i, ((a, b), w) in enumerate(zip(updates, WEIGHTS, strict=True))]
    found = merge_layer(merge, parents, options)
    return found.b, found.a


def peft_svd(updates: list[tuple[Any, Any]]) -> Callable[[], Any]:
    """PEFT's merge of these adapters, in a model of one layer; made before the clock starts."""
    import peft
    import torch

    size_O, size_I = len(updates[0][1]), updates[0][0].shape[1]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(size_I, size_O, bias=False)), config, "0")
    for i in range(1, ADAPTERS):
        model.add_adapter(str(i), config)
    leaf = model.base_model.model[0]
    for i, (a, b) in enumerate(updates):
        leaf.lora_A[str(i)].weight.data, leaf.lora_B[str(i)].weight.data = a.clone(), b.clone()

    def run() -> Any:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        model.add_weighted_adapter([str(i) for i in range(ADAPTERS)], list(WEIGHTS), "merged", "svd", svd_rank=RANK)
        return leaf.lora_B["merged"].weight.data, leaf.lora_A["merged"].weight.data

    return run


def dense_lowrank(updates: list[tuple[Any, Any]]) -> Any:
    """The dense sum, then torch's randomised SVD at its default of two iterations."""
    import torch

    total = sum(w * (b @ a) for (a, b), w in zip(updates, WEIGHTS, strict=True))
    u, s, v = torch.svd_lowrank(total, q=RANK)
    return u * s, v.mT


def errors(updates: list[tuple[Any, Any]], products: dict[str, Any]) -> dict[str, float]:
    """‖result - best rank 16‖ / ‖best rank 16‖ in float64; the best from QR of the stacked factors in float64."""
    import torch

    from veneer import lowrank

    stacked = lowrank.concatenate([(a.double(), b.double()) for a, b in updates], list(WEIGHTS))
    best_a, best_b, _ = lowrank.truncate(*stacked, RANK, exact=True)
    found = {}
    for name, (b, a) in products.items():
        difference = b.double() @ a.double() - best_b @ best_a
        found[name] = float(torch.linalg.matrix_norm(difference)) / lowrank.norm(best_a, best_b)
    return found


if __name__ == "__main__":
    main()
