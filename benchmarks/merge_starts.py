"""Where the second adapter's A should start if the two are to be merged: `python -m benchmarks.merge_starts`.

The pairs of tasks of `benchmarks.merge_quality`, and its adapter of the first task. The second task's is trained once
for every way of STARTS. Told are the second adapter's own score, and that of both tasks with both adapters merged
linearly, weights of 1/2 each and of 1 each; see `benchmarks.multitask` for tasks and scores.

- shared: from the same A as the first (the same seed);
- other: from another A (another seed, which also puts the rows in another order);
- orthogonal: `--orthogonal-to` the first: another A, outside of what the first reads, and O-LoRA's term;
- data: `--orthogonal-data` too: also outside of what the base's layers are fed on the first task's rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import multitask, record
from benchmarks.merge_kept import GAIN, MERGED, gain, over_tasks, worse, worse_loss
from benchmarks.merge_quality import JOINED, SEED, Experiment, Pair, at_scales, join, key, part_of
from veneer.evaluate.foretold import Foretold, foretell

STARTS = ("shared", "other", "orthogonal", "data")
OTHER = 1  # the seed of the other A


def main() -> None:
    """Trains, merges and scores, and writes benchmarks/results/merge_starts.json after each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=Path("out/merge-quality"), help="where adapters are kept")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "merge_starts.json")
    parser.add_argument("--part", default="1/1", type=part_of, metavar="N/M", help="the n-th of m parts of the pairs")
    parser.add_argument("--join", nargs="+", type=Path, metavar="FILE", help="outputs of parts, into one; nothing else")
    asked = parser.parse_args()
    if asked.join:
        joined = join(asked.join, ("base", "pairs"))
        asked.output.write_text(json.dumps(joined | {"kept": summary(joined)}, indent=2) + "\n", encoding="utf-8")
        return
    if not multitask.DATA.is_dir():
        sys.exit(f"no data at {multitask.DATA}; set VENEER_DATA to the folder that holds multitask")
    experiment = Experiment(multitask.names(), asked.adapters, {}, float("inf"))
    first, count = asked.part
    pairs = experiment.drawn[first - 1 :: count]
    held = json.loads(asked.output.read_text(encoding="utf-8")) if asked.output.exists() else {}
    result: dict[str, Any] = {"base": held.get("base", {}), "pairs": held.get("pairs", {})}
    tasks = sorted({task for pair in pairs for task in pair})
    experiment.each(tasks, result["base"], lambda task: experiment.scores([task], None)[task])
    alone = experiment.alone()
    firsts = {task: experiment.score(alone[task], [task]) for task in sorted({first for first, _ in pairs})}
    for start in STARTS:
        wanted = [pair for pair in pairs if start not in result["pairs"].get(key(pair), {})]
        for pair, second in seconds(experiment, alone, wanted, start).items():
            found = {"first": firsts[pair[0]], **scored(experiment, alone[pair[0]], second, pair)}
            result["pairs"].setdefault(key(pair), {})[start] = found
        record.save(asked.output.stem, result | {"kept": summary(result)}, asked.output.resolve().parent)
        print(start, file=sys.stderr, flush=True)


def seconds(experiment: Experiment, alone: dict[str, Any], pairs: list[Pair], start: str) -> dict[Pair, Any]:
    """The second task's adapter of each pair, started so."""
    if start == "shared":
        return {pair: alone[pair[1]] for pair in pairs}
    if start == "other":
        tasks = sorted({second for _, second in pairs})
        made = multitask.trained(experiment.loaded, {task: multitask.rows(task, "train") for task in tasks}, OTHER)
        return {pair: made[pair[1]] for pair in pairs}
    sets = {key(pair): multitask.rows(pair[1], "train") for pair in pairs}
    earlier = {key(pair): [earlier_of(experiment, alone[pair[0]], pair[0], start == "data")] for pair in pairs}
    made = multitask.trained(experiment.loaded, sets, OTHER, earlier)
    return {pair: made[key(pair)] for pair in pairs}


def earlier_of(experiment: Experiment, adapter: Any, task: str, with_data: bool) -> Any:
    """The first adapter as training apart from it wants it; with its training rows, of which every other one judges."""
    from veneer.train.earlier import Data, Earlier

    if not with_data:
        return Earlier(task, adapter)
    examples = multitask.encoded(experiment.loaded, multitask.rows(task, "train")[multitask.HELD_OUT :])
    return Earlier(task, adapter, Data(task, "", examples[::2], examples[1::2]))


def scored(experiment: Experiment, first: Any, second: Any, pair: Pair) -> dict[str, Any]:
    """Scores of the second adapter on its own task, and of both tasks by both merged."""
    from veneer.merge.apply import combine
    from veneer.merge.recipe import Recipe

    found = {"second": experiment.score(second, [pair[1]])}
    for name, scale in at_scales("linear").items():
        merged, _ = combine([first, second], Recipe("linear", (scale, scale), {}), progress=False)
        found[name] = experiment.score(merged, pair)
    return found


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """By start and weights: of its gain in score, what the worse of the two tasks keeps, the mean over pairs, and that
    less the same of STARTS[0], and of STARTS[1], with its 95 % interval over tasks; over pairs that have all starts
    there are, and whose tasks gain GAIN or more by their adapters of STARTS[0]."""
    pairs = result["pairs"]
    starts = [start for start in STARTS if any(start in found for found in pairs.values())]
    common = [
        pair
        for pair, found in pairs.items()
        if all(start in found for start in starts) and _gain(result["base"], _own(pair, found[STARTS[0]])) >= GAIN
    ]
    shares = {
        (start, name): {p: worse(result["base"], _own(p, pairs[p][start]), pairs[p][start][name]) for p in common}
        for start in starts
        for name in at_scales("linear")
    }
    summed: dict[str, Any] = {}
    for start in starts if common else ():
        summed[start] = {
            name.replace(" ", "_"): {
                "pairs": len(common),
                "kept": round(float(np.mean(list(shares[start, name].values()))), 4),
                **{
                    f"less_{other}": over_tasks({p: shares[start, name][p] - shares[other, name][p] for p in common})
                    for other in starts[:2]
                },
            }
            for name in at_scales("linear")
        }
        shares_of_loss = [worse_loss(result["base"], _own(p, pairs[p][start]), pairs[p][start][MERGED]) for p in common]
        told = [foretell(0, 1, loss_kept) for loss_kept in shares_of_loss]
        summed[start]["foretold"] = agreement(told, [shares[start, MERGED][pair] for pair in common])
    return summed


def agreement(told: Sequence[Foretold], kept: Sequence[float]) -> dict[str, float | None]:
    """Of what `veneer inspect` foretells from held-out rows: its correlation with what was kept, and how often that lay
    in the range told, in which four of five pairs lay whose tasks the curve was not fitted on. The tasks of these pairs
    are among those of the fit, and of STARTS[0] the very adapters."""
    within = [one.low <= share <= one.high for one, share in zip(told, kept, strict=True)]
    correlation = round(float(np.corrcoef([one.share for one in told], kept)[0, 1]), 4) if len(told) > 1 else None
    return {"correlation": correlation, "within": round(float(np.mean(within)), 4)}


def _own(pair: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of each task of a pair the scores of its own adapter."""
    return {task: found[which][task] for task, which in zip(pair.split(JOINED), ("first", "second"), strict=True)}


def _gain(base: Mapping[str, Any], alone: Mapping[str, Any]) -> float:
    """In score, of the adapter that gains less."""
    return min(gain(base[task], scores) for task, scores in alone.items())


assert SEED != OTHER

if __name__ == "__main__":
    main()
