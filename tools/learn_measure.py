"""Measure what docs/learn.md shows, on smollm2 and the demo's data set: docs/learn/measured.json.

python tools/learn_measure.py    # about ten minutes on two idle cores; then: python tools/learn_figures.py
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from veneer import lowrank
from veneer.adapter.attach import attach, detach, methods_of
from veneer.adapter.take import take
from veneer.config import LoraSettings, RunConfig
from veneer.data.toolcalls import write
from veneer.errors import TrainingError
from veneer.model.load import Loaded, load
from veneer.model.losses import sequence_nll
from veneer.model.quantised import storage_class
from veneer.train.prepare import SLOT
from veneer.train.rows import read_data
from veneer.train.run import train

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "learn" / "measured.json"
LAYER = "model.layers.15.self_attn.q_proj"
RANKS, RATES, STEPS = (1, 8, 64), (3e-4, 1e-3, 3e-3, 1e-2), 15
LONGER = 40  # steps of the run whose update is taken apart
STORAGES = ("int8", "nf4", "nf4-dq", "int4")


def main() -> None:
    """Measures everything and writes the file."""
    with tempfile.TemporaryDirectory() as folder:
        loaded, data = load("smollm2"), str(write(folder, n_train=1600, n_test=1)["train"])
        weight_OI = loaded.model.get_submodule(LAYER).weight.detach().float()
        sweep = [_run(loaded, data, folder, rank, rate, STEPS) for rank in RANKS for rate in RATES]
        _run(loaded, data, folder, 64, None, LONGER, keep=True)
        spectrum = _spectrum(loaded, weight_OI)
        detach(loaded.model, SLOT)
        start = _start(loaded, RunConfig.from_flat(_options(data, folder, 8, None, 1)))
    found = {"layer": LAYER, "steps": STEPS, "longer": LONGER, "start": start, "sweep": sweep}
    found |= {"spectrum": spectrum, "quantised": _quantised(weight_OI)}
    MEASURED.write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")


def _options(data: str, folder: str, rank: int, rate: float | None, steps: int) -> dict[str, Any]:
    run = {"base_model": "smollm2", "dataset": data, "output_dir": f"{folder}/run", "r": rank, "learning_rate": rate}
    return {
        **run,
        "max_steps": steps,
        "validation_split": 16,
        "per_device_train_batch_size": 4,
        "eval_steps": steps,
        "load_best_model_at_end": False,
    }


def _run(
    loaded: Loaded, data: str, folder: str, rank: int, rate: float | None, steps: int, keep: bool = False
) -> dict[str, Any]:
    """One short run: held-out loss before and after, and the size of the update beside its weight (median layer)."""
    config = RunConfig.from_flat(_options(data, folder, rank, rate, steps))
    facts: dict[str, Any] = {"r": rank, "learning_rate": rate}
    try:
        train(config, loaded=loaded)
        lines = [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]
        held_out = [line["loss"] for line in lines if line["split"] == "eval"]
        card = json.loads(Path(config.output_dir, "veneer.json").read_text())
        update = statistics.median(card["training"]["update_norms"].values())
        facts |= {"before": held_out[0], "after": held_out[-1], "update": update}
    except TrainingError:
        facts |= {"before": None, "after": None, "update": None}  # too large a rate: the loss was no number any more
    if not keep:
        detach(loaded.model, SLOT)
    return facts


def _spectrum(loaded: Loaded, weight_OI: torch.Tensor) -> dict[str, Any]:
    """Singular values of the layer's weight and of its update, each beside its largest; shares over all layers."""
    adapter = take(loaded.model, SLOT)
    update = lowrank.singular_values(*adapter.factors(LAYER))
    weight = torch.linalg.svdvals(weight_OI)
    squares = [lowrank.singular_values(*adapter.factors(module)).square() for module in adapter.modules()]
    shares = {k: statistics.median(float(s[:k].sum() / s.sum()) for s in squares) for k in (1, 2, 4, 8, 16, 32)}
    return {
        "weight": (weight / weight[0]).tolist(),
        "update": (update / update[0]).tolist(),
        "share_of_update": {str(k): share for k, share in shares.items()},
    }


def _start(loaded: Loaded, config: RunConfig) -> dict[str, float]:
    """Held-out loss of the base, with A and B as they start, and with B as random as A."""
    rows = read_data(config, loaded.tokenizer).validation
    attach(loaded.model, LoraSettings(r=8), SLOT)
    found = {"base": _loss(loaded, rows, None), "b_zero": _loss(loaded, rows, SLOT)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for method in methods_of(loaded.model, SLOT).values():
            noise = torch.rand(method.b_OR.shape, generator=generator) * 2 - 1
            method.b_OR.copy_(noise * method.a_RI.abs().max().cpu())
    found["b_random"] = _loss(loaded, rows, SLOT)
    detach(loaded.model, SLOT)
    return found


def _loss(loaded: Loaded, rows: Any, slot: str | None) -> float:
    sums = sequence_nll(loaded.model, rows, slot)
    return sum(nll for nll, _ in sums) / sum(count for _, count in sums)


def _quantised(weight_OI: torch.Tensor) -> dict[str, Any]:
    """What storages make of the layer's weight: |W' - W| / |W|, and the first block of 64 values in NF4."""
    errors, block = {}, {}
    for name in STORAGES:
        stored = storage_class(name).from_weight(weight_OI).dense()
        errors[name] = float((stored - weight_OI).norm() / weight_OI.norm())
        block[name] = stored.reshape(-1)[:64].tolist()
    return {"error": errors, "weight": weight_OI.reshape(-1)[:64].tolist(), "nf4": block["nf4"]}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
