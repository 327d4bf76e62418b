"""What a storage of the base costs in quality: `python -m benchmarks.storages [--seeds 0,1,2] [--steps 40]`.

LoRA of rank 8 on all linear layers of SmolLM2-135M, E2E NLG, the same rows in the same order beside every storage of
the frozen base; full fine-tuning of the dense model beside them. Loss on held-out rows before and after, and the
paired difference to the dense base, row by row, with a bootstrap interval (95 %).

fp8 is the weights alone, on a CPU. The model is 135M parameters whose weights were stored in 4 bits once (Q4_1: uniform
levels, blocks of 32), so what 4 bits cost here is not what they cost a model that was never quantised.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

DATA = record.ROOT / os.environ.get("VENEER_DATA", "../shared/data") / "e2e_nlg"
STORAGES = ("dense", "fp8", "int8", "int8-outlier", "int4", "nf4", "nf4-dq")
FULL = "full fine-tuning"
BATCH, RANK, HELD_OUT = 8, 8, 200
# A tenth of LoRA's rate (Schulman et al. 2025: the best rates differ by ten).
FULL_RATE_SHARE = 0.1


def main(words: Sequence[str] | None = None) -> None:
    """Runs every storage for every seed and writes benchmarks/results/storages.json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--systems", default=",".join([*STORAGES, FULL]))
    asked = parser.parse_args(words)
    if not DATA.is_dir():
        sys.exit(f"no data at {DATA}; set VENEER_DATA to the folder that holds e2e_nlg")
    rows: dict[str, dict[str, Any]] = {}
    for seed in map(int, asked.seeds.split(",")):
        for system in asked.systems.split(","):
            begun = time.perf_counter()
            rows.setdefault(system, {})[str(seed)] = one(system, seed, asked.steps)
            print(f"{system}, seed {seed}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
            record.save("storages", {"steps": asked.steps, "rows_per_step": BATCH, "rank": RANK, **compared(rows)})


def one(system: str, seed: int, steps: int) -> dict[str, Any]:
    """Sum of cross-entropies and number of targets of every held-out row, before and after."""
    from veneer.config import RunConfig
    from veneer.model.load import load
    from veneer.train.prepare import SLOT
    from veneer.train.rows import read_data
    from veneer.train.run import train

    storage = "dense" if system in (FULL, "fp8") else system
    loaded = load("smollm2", storage=storage, progress=False)
    if system == "fp8":
        weights_in_fp8(loaded.model)
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.from_flat(
            {
                "base_model": "smollm2",
                "dataset": str(DATA / "train.jsonl"),
                "eval_dataset": str(_held_out(Path(folder))),
                "output_dir": f"{folder}/out",
                "max_steps": steps,
                "per_device_train_batch_size": BATCH,
                "r": RANK,
                "eval_steps": steps + 1,
                "load_best_model_at_end": False,
                "seed": seed,
            }
        )
        data = read_data(config, loaded.tokenizer)
        before = losses(loaded.model, data.validation, None)
        if system == FULL:
            fully(loaded.model, data.train, config, steps)
            after = losses(loaded.model, data.validation, None)
        else:
            train(config, progress=False, loaded=loaded)
            after = losses(loaded.model, data.validation, SLOT)
    return {"before": before, "after": after}


def weights_in_fp8(model: Any) -> None:
    """Rounds every linear layer's weight to e4m3. A CPU does not multiply e4m3, so the loader refuses it there; what it
    costs to round activations too is not in these figures."""
    from veneer.bases.fp8 import FP8
    from veneer.model.swap import linear_paths, place_leaf

    for path in linear_paths(model):
        linear = model.get_submodule(path)
        place_leaf(model, path, FP8.from_weight(linear.weight, linear.bias))


def losses(model: Any, rows: Sequence[Any], slot: str | None) -> list[tuple[float, int]]:
    from veneer.model.losses import sequence_nll

    return sequence_nll(model, rows, slot)


def fully(model: Any, rows: Sequence[Any], config: Any, steps: int) -> None:
    """AdamW on all weights but the norms, in float32, with the adapters' warm-up and decay; products in bfloat16 where
    that is faster; the same rows in the same order."""
    import torch

    from veneer.data.batches import Batches
    from veneer.model.load import fastest_dtype
    from veneer.train.schedule import choose_rate, factor

    peak = choose_rate(config.train, config.lora, model.config, steps).value * FULL_RATE_SHARE
    model.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0, fused=True)
    half = fastest_dtype(torch.device("cpu"))
    batches = Batches(len(rows), BATCH, config.train.seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * factor(config.train, step, steps)
        here = [rows[row] for row in batches.rows(step)]
        targets = sum(sum(example.targets[1:]) for example in here)
        for example in here:
            ids = torch.tensor([example.input_ids])
            labels = torch.where(torch.tensor([example.targets]), ids, -100)
            with torch.autocast("cpu", dtype=half, enabled=half != torch.float32):
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").div(targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.to(half).requires_grad_(False)


def compared(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Loss in nats a token over rows and seeds, and paired differences to the dense base, with intervals."""
    from veneer.evaluate.intervals import RATIO, weighted

    found = {}
    for system, seeds in rows.items():
        entry: dict[str, Any] = {"seeds": sorted(seeds)}
        shared = [seed for seed in sorted(seeds) if seed in rows.get("dense", {})]
        for when in ("before", "after"):
            entry[when] = _score(RATIO.score(weighted(*_columns(seeds, sorted(seeds), when))))
            if shared:
                mine, tokens = _columns(seeds, shared, when)
                theirs, _ = _columns(rows["dense"], shared, when)
                entry[f"{when}_less_dense"] = _score(RATIO.difference(weighted(mine, tokens), weighted(theirs, tokens)))
        found[system] = entry
    return {"held_out_rows": HELD_OUT, "systems": found}


def _columns(seeds: dict[str, Any], chosen: Sequence[str], when: str) -> tuple[list[float], list[int]]:
    pairs = [pair for seed in chosen for pair in seeds[seed][when]]
    return [nll for nll, _ in pairs], [count for _, count in pairs]


def _score(found: Any) -> dict[str, Any]:
    return {"score": found.score, "low": found.low, "high": found.high}


def _held_out(folder: Path) -> Path:
    lines = (DATA / "dev.jsonl").read_text(encoding="utf-8").splitlines()[:HELD_OUT]
    path = folder / "held_out.jsonl"
    path.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
