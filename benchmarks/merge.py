"""Merging adapters without dense matrices, against PEFT: `python -m benchmarks.merge [--sizes 2048,4096] [--rounds 5]`.

Eight adapters of rank 16 into one of rank 16, one linear layer, mixed weights, one thread; in turns: ours (`svd`), ours
by Householder QR in float64 (`exact`), PEFT's `add_weighted_adapter(combination_type="svd")` on a model of that layer,
and the same dense sum with torch.svd_lowrank in the place of the SVD, which is what a careful user might write. The
error of each is its distance to the best rank 16 of the float64 sum, as a share of it.

PEFT takes about 20 s a layer of 4096 x 4096, so that size is asked for. `--model` times ours alone on all 224 layers of
an 8B shape (hidden 4096, MLP 14336, 32 layers), on all cores.
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

from benchmarks import record

ADAPTERS, RANK = 8, 16
WEIGHTS = (1.0, -1.0, 0.5, 0.3, 0.7, 1.0, -0.2, 2.0)
SHAPES_8B = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
LAYERS_8B = 32


def main(words: Sequence[str] | None = None) -> None:
    """Runs all systems in turns and writes benchmarks/results/merge.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2048")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", action="store_true")
    asked = parser.parse_args(words)
    import torch

    torch.set_num_threads(1)
    found = {size: layer(size, asked.rounds) for size in map(int, asked.sizes.split(","))}
    result: dict[str, Any] = {"adapters": ADAPTERS, "rank": RANK, "threads": 1, "layers": found}
    if asked.model:
        result["model_8b"] = whole_model()
    record.save("merge", result)


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
            begun = time.perf_counter()
            products[name] = run()
            seconds[name].append(time.perf_counter() - begun)
            print(f"{size} x {size}, {name}: {seconds[name][-1]:.4f} s", file=sys.stderr, flush=True)
    return {
        "seconds": {name: {"median": median(taken), "rounds": taken} for name, taken in seconds.items()},
        "error": errors(updates, products),
        "peft_over": {name: record.ratios(seconds["peft_svd"], seconds[name]) for name in systems},
    }


def adapters(outputs: int, inputs: int, seed: int) -> list[tuple[Any, Any]]:
    """Factors a (R, I), b (O, R) whose directions fall off like those of trained ones."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    fall_R = 0.8 ** torch.arange(RANK)
    return [
        (torch.randn(RANK, inputs, generator=draw) * 0.02, torch.randn(outputs, RANK, generator=draw) * 0.02 * fall_R)
        for _ in range(ADAPTERS)
    ]


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


def whole_model() -> dict[str, Any]:
    """Seconds for all layers of an 8B shape: a pool of threads as in `combine`, one layer's factors made for all."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    stacks = [adapters(outputs, inputs, seed) for seed, (outputs, inputs) in enumerate(SHAPES_8B)] * LAYERS_8B
    cores = len(os.sched_getaffinity(0))
    begun = time.perf_counter()
    with ThreadPoolExecutor(cores, initializer=lambda: torch.set_num_threads(1)) as pool:
        list(pool.map(ours, stacks))
    return {"matrices": len(stacks), "cores": cores, "seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    main()
