"""What adapters keep of their tasks once they are made one: shares of a gain, means over pairs, intervals over tasks.

Scores are those of `benchmarks.multitask`: of a task by the base, by its own adapter alone, by what was made of two.
Told is the task that fares worse. A task whose own adapter gains next to nothing has next to nothing to keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.merge_quality import JOINED
from veneer.evaluate.foretold import gain_kept

MERGED = "linear 1/2"  # what all else is compared with
GOOD = 0.9  # share of its gain from which on a task counts as kept
GAIN = 0.1  # in score; of a task whose own adapter gains less, a few answers of a hundred are all there is to keep
DRAWS, SEED = 2000, 0  # of the bootstrap
Scores = Mapping[str, Any]  # task -> its score and loss, of test rows and of those held out of training


def gain(base: Mapping[str, float], alone: Mapping[str, float]) -> float:
    return alone["score"] - base["score"]


def kept(base: Mapping[str, float], alone: Mapping[str, float], merged: Mapping[str, float]) -> float:
    """What a merged adapter keeps of a task's gain in score, at most 1. Raises ZeroDivisionError without a gain."""
    return min(1.0, gain(base, merged) / gain(base, alone))


def worse(base: Scores, alone: Scores, found: Scores) -> float:
    """What the worse of the tasks in `alone` keeps of its gain in score on its test rows."""
    return min(kept(base[task], own, found[task]) for task, own in alone.items())


def worse_loss(base: Scores, alone: Scores, found: Scores) -> float:
    """The same of its gain in loss on held-out rows."""
    losses = ([one["held"]["loss"] for one in (base[task], own, found[task])] for task, own in alone.items())
    return min(gain_kept(*three) for three in losses)


def own(held: Mapping[str, Any], pair: str) -> dict[str, Any]:
    """Of each task of a pair the scores of its own adapter."""
    return {task: held["alone"][task][task] for task in pair.split(JOINED)}


def gaining(held: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, without the pairs of tasks whose own adapters gain less than GAIN."""
    tasks = {task for task, own in held["alone"].items() if gain(held["base"][task], own[task]) >= GAIN}
    return {**held, "pairs": {pair: found for pair, found in held["pairs"].items() if tasks >= {*pair.split(JOINED)}}}


def finished(pairs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The ways that were tried on all pairs, and of the others those that were tried on the most."""
    tried = Counter(name for found in pairs.values() for name in found)
    enough = max((count for count in tried.values() if count < len(pairs)), default=len(pairs))
    return sorted(name for name, count in tried.items() if count >= enough)


def by_method(held: Mapping[str, Any]) -> dict[str, Any]:
    """Of each way to make one adapter of two that is `finished`, over the pairs that all of those made: what the worse
    task keeps of its gain, in how many pairs that is GOOD or more, and the difference to MERGED with its 95 % interval
    over tasks."""
    names = finished(held["pairs"])
    made = {pair: found for pair, found in held["pairs"].items() if found.keys() >= {*names, MERGED}}
    each = {
        name: {pair: worse(held["base"], own(held, pair), found[name]) for pair, found in made.items()}
        for name in names
    }
    result = {}
    for name, found in each.items() if made else ():
        shares = np.array(list(found.values()))
        result[name.replace(" ", "_")] = {
            "pairs": len(shares),
            "kept": round(float(shares.mean()), 4),
            "median": round(float(np.median(shares)), 4),
            "good": round(float((shares >= GOOD).mean()), 4),
            "less_linear": over_tasks({pair: share - each[MERGED][pair] for pair, share in found.items()}),
        }
    return result


def over_tasks(found: Mapping[str, float]) -> dict[str, float]:
    """The mean of a figure over pairs, and its 95 % interval over tasks: a pair counts as often as both were drawn."""
    tasks = sorted({task for pair in found for task in pair.split(JOINED)})
    draws = np.random.default_rng(SEED).multinomial(len(tasks), np.full(len(tasks), 1 / len(tasks)), size=DRAWS)
    places = np.array([[tasks.index(task) for task in pair.split(JOINED)] for pair in found])
    weights, values = draws[:, places[:, 0]] * draws[:, places[:, 1]], np.array(list(found.values()))
    some = weights.sum(1) > 0  # a draw of tasks without a pair among them says nothing
    low, high = np.percentile((weights[some] @ values) / weights[some].sum(1), [2.5, 97.5])
    return {"score": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def methods_table(found: Mapping[str, Any]) -> list[str]:
    """A row for each way, the best first."""
    lines = [f"{'made by':<15} {'pairs':>5} {'kept':>6} {'median':>7} {'good':>6}  {'less linear 1/2':>20}"]
    for name, one in sorted(found.items(), key=lambda item: -item[1]["kept"]):
        less = one["less_linear"]
        sure = f"{less['score']:+.2f} [{less['low']:+.2f}, {less['high']:+.2f}]"
        lines.append(
            f"{name:<15} {one['pairs']:>5} {one['kept']:>6.1%} {one['median']:>7.1%} {one['good']:>6.1%}  {sure:>20}"
        )
    return lines
