"""Which variant a system runs with, how rounds interleave, what is kept: over a fake run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.gpu_rows import Row
from benchmarks.gpu_spec import Spec
from benchmarks.gpu_sweep import NO_TIME, SCAN_STEPS, Clock, choose, chosen, entry, ratios, rounds, scan

ROW = Row(
    "title",
    "8b",
    {
        "ours-nf4": ((4, "none", True), (4, "layers", True), (1, "layers", True)),
        "qlora-unsloth": ((4, "unsloth", False),),
        "qlora-peft": ((2, "layers", False),),
    },
    within="qlora-unsloth",
)
UNTRIED: dict[str, list[dict[str, Any]]] = {system: [] for system in ROW.systems}
OOM = {"oom": "CUDA out of memory", "peak_gib": 79.0, "process_seconds": 30.0}


def made(speed: float, peak: float, **more: Any) -> dict[str, Any]:
    memory = {"peak_gib": peak, "driver_gib": peak + 1}
    return {"tokens_per_second": speed, **memory, "losses": [12.0, 11.0], "process_seconds": 30.0, **more}


def fake(table: dict[tuple[str, str, int], dict[str, Any]], seen: list[Spec]) -> Callable[[Spec], dict[str, Any]]:
    def run(spec: Spec) -> dict[str, Any]:
        seen.append(spec)
        return {**table[spec.system, spec.recompute, spec.batch], "variant": spec.variant, "spec": spec.__dict__}

    return run


TABLE = {
    ("ours-nf4", "none", 4): OOM,
    ("ours-nf4", "layers", 4): made(12000, 9.5),
    ("ours-nf4", "layers", 1): made(11000, 7.0),
    ("qlora-unsloth", "unsloth", 4): made(10000, 10.0),
}


def test_the_fastest_that_fits_wins_and_where_none_fits_the_smallest() -> None:
    tried = [made(12000, 9.5), made(11000, 7.0), OOM, {"failed": "exit code 1"}]
    assert choose(tried) == tried[0]
    assert choose(tried, made(1, 8.0)) == tried[1]
    assert choose(tried, made(1, 1.0)) == tried[1]
    assert choose(tried, made(1, 10.0) | {"driver_gib": 8.5}) == tried[1]  # less for tensors, more in all
    assert choose([OOM]) is None


def test_a_scan_tries_every_variant_and_the_bound_comes_from_the_peer() -> None:
    seen: list[Spec] = []
    trials = scan(ROW, UNTRIED, fake(TABLE, seen), Clock(None))
    assert [spec.system for spec in seen] == ["qlora-unsloth", "ours-nf4", "ours-nf4", "ours-nf4"]
    assert all(spec.steps == SCAN_STEPS for spec in seen)
    assert chosen(ROW, trials)["ours-nf4"].variant == {"batch": 4, "passes": 1, "recompute": "layers", "compile": True}
    assert chosen(ROW, trials)["qlora-peft"] == ROW.candidates("qlora-peft", SCAN_STEPS)[0]  # no choice, no trial
    trials["qlora-unsloth"][0]["peak_gib"] = 8.0
    assert chosen(ROW, trials)["ours-nf4"].batch == 1
    again = scan(ROW, trials | {"ours-nf4": trials["ours-nf4"][1:]}, fake(TABLE, seen), Clock(None))
    assert again == trials and [spec.recompute for spec in seen[4:]] == ["none"]


def test_a_system_of_which_nothing_worked_is_left_out() -> None:
    spec = ROW.candidates("qlora-unsloth", 3)[0]
    trials = {"ours-nf4": [OOM], "qlora-unsloth": [made(1, 1, variant=spec.variant)]}
    assert list(chosen(ROW, trials)) == ["qlora-unsloth"]


def test_no_run_is_begun_that_would_outlast_the_budget() -> None:
    now = iter([0.0, 0.0, 50.0, 80.0, 95.0, 96.0])  # at the start, then before each run
    seen: list[Spec] = []
    clock = Clock(100.0, lambda: next(now))
    trials = scan(ROW, UNTRIED, fake(TABLE, seen), clock, expected=60.0)
    assert len(seen) == 2  # the third would begin at 80 s and take 30
    assert [t.get("failed") for t in trials["ours-nf4"]] == [None, NO_TIME, NO_TIME]
    trials["qlora-unsloth"] = [{"failed": NO_TIME}]
    assert "ours-nf4" not in chosen(ROW, trials)  # nothing bounds it


def test_rounds_rotate_and_run_the_asked_number_of_steps() -> None:
    seen: list[Spec] = []
    specs = {"ours-nf4": ROW.candidates("ours-nf4", 3)[1], "qlora-unsloth": ROW.candidates("qlora-unsloth", 3)[0]}
    kept: list[dict[str, int]] = []

    def keep(runs: dict[str, list[dict[str, Any]]]) -> None:
        kept.append({system: len(done) for system, done in runs.items()})

    rounds(specs, 2, 8, fake(TABLE, seen), Clock(None), keep)
    assert [spec.system for spec in seen] == ["ours-nf4", "qlora-unsloth", "qlora-unsloth", "ours-nf4"]
    assert all(spec.steps == 8 for spec in seen)
    assert kept == [{"ours-nf4": n, "qlora-unsloth": n} for n in (1, 2)]  # nothing is lost if the second is cut off


def test_ratios_leave_out_rounds_in_which_one_side_failed() -> None:
    found = ratios({"ours": [made(12, 8), OOM, made(20, 9)], "unsloth": [made(10, 10), made(10, 10), made(10, 10)]})
    ratio = found["ours"]["unsloth"]
    assert ratio["tokens_per_second"]["rounds"] == [1.2, 2.0] and ratio["tokens_per_second"]["median"] == 1.6
    assert ratio["peak_gib"]["rounds"] == pytest.approx([0.8, 0.9])
    assert ratio["first_loss_gap"] == 0.0
    assert ratios({"ours": [OOM], "unsloth": [made(1, 1)]}) == {}


def test_an_entry_holds_medians_of_the_rounds_that_worked_and_the_share_of_the_ceiling() -> None:
    spec = Spec("ours", "8b")
    cold = made(9000, 30, cold=True, start_to_first_step_seconds=90.0)
    warm = [made(speed, 30, cold=False, start_to_first_step_seconds=25.0) for speed in (10000, 14000, 12000)]
    held = entry(spec, [cold], [*warm, OOM], {"bf16_tflops": 700.0, "fp8_tflops": 1400.0})
    assert (held["tokens_per_second"], held["low"], held["high"]) == (12000, 10000, 14000)
    assert held["share_of_ceiling"] == pytest.approx(12000 * held["gflop_per_token"] / 700e3)
    assert (held["cold_start_seconds"], held["warm_start_seconds"]) == (90.0, 25.0)
    assert len(held["runs"]) == 4 and len(held["trials"]) == 1


def test_an_entry_without_a_run_that_worked_holds_no_figures() -> None:
    assert "tokens_per_second" not in entry(Spec("ours", "8b"), [OOM], [OOM], None)
