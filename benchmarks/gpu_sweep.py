"""One row: a scan picks each system's best variant, then interleaved rounds measure; what is kept of it.

Nothing here needs a GPU: `run` is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks import record
from benchmarks.gpu_process import Result, worked
from benchmarks.gpu_rows import Row, is_ours
from benchmarks.gpu_spec import Spec, flop_per_token, ideal_seconds_per_token

SCAN_STEPS = 8
NO_TIME = "no time left"
STEPS = {"steps": None}  # of a spec: what may differ between a trial and another of the same
MEMORY = ("peak_gib", "driver_gib")  # of the allocator's tensors, and of all that the process holds
Run = Callable[[Spec], Result]
Runs = dict[str, list[Result]]
# Figures of which a system's entry holds the median over its rounds.
FIGURES = (
    *("tokens_per_second", "step_seconds", "idle_gib", "peak_gib", "reserved_gib", "driver_gib", "host_gib"),
    *("build_peak_gib", "ready_seconds", "first_step_seconds", "start_to_first_step_seconds", "process_seconds"),
)
KEPT = ("trained", "trained_dtypes", "moment_dtypes", "losses", "base_weight", "attention", "allocator", "versions")


class Clock:
    """Time left of a budget in seconds; None: no end. A run is begun only where one of its length still fits."""

    def __init__(self, budget: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.budget, self.begun = now, budget, now()

    def fits(self, seconds: float) -> bool:
        return self.budget is None or self.now() - self.begun + seconds <= self.budget


def scan(
    row: Row, known: dict[str, list[Result]], run: Run, clock: Clock, expected: float = 60.0
) -> dict[str, list[Result]]:
    """Every variant once, a few steps each, unless it is among the trials that are `known` or there is no choice. The
    system whose memory bounds ours goes first."""
    trials: dict[str, list[Result]] = {}
    for system, tried in sorted(known.items(), key=lambda item: item[0] != row.within):
        specs = row.candidates(system, SCAN_STEPS)
        trials[system] = []
        for spec in specs if len(specs) > 1 or system == row.within else []:
            made = next((one for one in tried if one.get("spec", {}) | STEPS == spec.__dict__ | STEPS), None)
            if made is None and not clock.fits(expected):
                made = {"failed": NO_TIME, "variant": spec.variant}
            elif made is None:
                made = run(spec)
                expected = max(20.0, made.get("process_seconds", expected))
            trials[system].append(made)
    return trials


def choose(trials: Sequence[Result], bound: Result | None = None) -> Result | None:
    """The fastest that worked, among those that take no more memory than `bound`; where none does, the smallest."""
    good = [made for made in trials if worked(made)]
    fitting = [made for made in good if bound is None or all(made[name] <= bound[name] for name in MEMORY)]
    if fitting:
        return max(fitting, key=lambda made: made["tokens_per_second"])
    return min(good, key=lambda made: made["peak_gib"], default=None)


def chosen(row: Row, trials: dict[str, list[Result]]) -> dict[str, Spec]:
    """System -> its best variant; systems of which none worked are left out, and ours where what bounds it has not."""
    bound = choose(trials.get(row.within or "", []))
    picked = {}
    for system, tried in trials.items():
        specs = row.candidates(system, SCAN_STEPS)
        if is_ours(system) and row.within is not None and bound is None:
            continue
        best = choose(tried, bound if is_ours(system) else None)
        if best is not None:
            picked[system] = next(spec for spec in specs if spec.variant == best["variant"])
        elif len(specs) == 1:
            picked[system] = specs[0]
    return picked


def rounds(
    specs: dict[str, Spec], count: int, steps: int, run: Run, clock: Clock, keep: Callable[[Runs], None]
) -> None:
    """`count` rounds of every system in rotated order; a round that would not fit the clock is not begun.
    `keep` gets all runs so far after every round."""
    runs: dict[str, list[Result]] = {system: [] for system in specs}
    needed = 60.0 * len(specs)
    for number in range(count):
        if not clock.fits(needed):
            break
        begun = clock.now()
        for system in rotated(list(specs), number):
            runs[system].append(run(specs[system].but(steps=steps)))
        keep(runs)
        needed = clock.now() - begun


def rotated(systems: list[str], number: int) -> list[str]:
    """Another system begins each round, so that none always runs on a device just warmed."""
    at = number % len(systems) if systems else 0
    return systems[at:] + systems[:at]


def entry(spec: Spec, trials: list[Result], runs: list[Result], ceiling: dict[str, float] | None) -> dict[str, Any]:
    """What the file holds of one system in one row."""
    good = [made for made in runs if worked(made)]
    held: dict[str, Any] = {"spec": {**spec.__dict__}, "variant": spec.variant, "trials": trials, "runs": runs}
    if not good:
        return held
    held |= {name: median(made[name] for made in good) for name in FIGURES if all(name in made for made in good)}
    held |= {name: good[-1][name] for name in KEPT if name in good[-1]}
    speeds = [made["tokens_per_second"] for made in good]
    held |= {"low": min(speeds), "high": max(speeds), "gflop_per_token": sum(flop_per_token(spec).values()) / 1e9}
    if ceiling:
        held["share_of_ceiling"] = ideal_seconds_per_token(spec, ceiling) * held["tokens_per_second"]
    return held | _starts(trials, good)


def _starts(trials: list[Result], good: list[Result]) -> dict[str, float]:
    """Seconds from the start of the process to the end of its first step, with empty and with filled caches."""
    name = "start_to_first_step_seconds"
    cold = [made[name] for made in [*trials, *good] if made.get("cold") and name in made]
    warm = [made[name] for made in good if not made.get("cold") and name in made]
    return {f"{kind}_start_seconds": median(values) for kind, values in (("cold", cold), ("warm", warm)) if values}


def ratios(runs: dict[str, list[Result]]) -> dict[str, Any]:
    """Each system of ours over each peer in speed and peak memory, of the rounds where both worked."""
    found: dict[str, Any] = {}
    for ours in filter(is_ours, runs):
        for peer in (system for system in runs if not is_ours(system)):
            pairs = [(a, b) for a, b in zip(runs[ours], runs[peer], strict=False) if worked(a) and worked(b)]
            if pairs:
                found.setdefault(ours, {})[peer] = {
                    "tokens_per_second": record.ratios(*_columns(pairs, "tokens_per_second")),
                    "peak_gib": record.ratios(*_columns(pairs, "peak_gib")),
                    "first_loss_gap": max(abs(a["losses"][0] - b["losses"][0]) for a, b in pairs),
                    "largest_loss_gap": max(
                        abs(x - y) for a, b in pairs for x, y in zip(a["losses"], b["losses"], strict=False)
                    ),
                }
    return found


def _columns(pairs: list[tuple[Result, Result]], name: str) -> tuple[list[float], list[float]]:
    return [a[name] for a, _ in pairs], [b[name] for _, b in pairs]
