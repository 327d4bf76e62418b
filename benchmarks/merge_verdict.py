"""Can it be told before whether two adapters may be merged? `python -m benchmarks.merge_verdict`.

Reads what `benchmarks.merge_quality` measured. Of two adapters one may be made by adding them (`merge`: linear, 1/2
each), by weights learned on thirty rows of each task (`learn`: LoRA Soups) or by training anew on the rows of both
(`retrain`); or both are served, each for its own task (`route`). What that is worth is the share of its own adapter's
gain that the worse task keeps, less a price: a routed pair keeps everything and costs ROUTE, retraining needs all data
and a run and costs RETRAIN, merging and learning weights cost nothing. What a plain merge would keep is foretold by a
ridge regression from

- cosine: of the two updates;
- weights: all that `veneer inspect A B` measures without data;
- rows: what a merge keeps of the gain in loss on 30 rows that neither was trained on (by which each adapter's best step
  was chosen), the worse of the two, k: as log(1.1 - k), since the last hundredths of loss decide about answers, and by
  a logistic curve (both chosen by looking at these pairs, the former at 60 of them);
- half: the same of each adapter alone at half its weight, without the other;

and the verdict is what is then worth most. Tasks are split at random, again and again: fitted on pairs of two thirds of
them, judged on pairs of the others. Told are AUC (is merging better than routing?), how often of two pairs the better
one is told so, the error beside that of always telling the mean, calibration, and what the verdict loses of the best
choice's worth where all were tried, beside the choice that was best in the mean over the pairs fitted on (`usual`), and
beside always choosing the same; the latter at other prices too. `rows`, fitted on
all pairs, is what `veneer inspect --dataset` foretells shares by. Pairs of a task whose own adapter gains next to
nothing are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.merge_kept import (
    MERGED,
    by_method,
    finished,
    gaining,
    methods_table,
    over_tasks,
    own,
    worse,
    worse_loss,
)
from benchmarks.merge_quality import JOINED, JOINT
from veneer.evaluate.foretold import log_lost, share_kept

LEARNED = "lora_soups"
ROUTE, RETRAIN = 0.2, 0.3  # of the worse task's gain, what one would give up to be spared it
CHOICES: dict[str, tuple[str | None, float]] = {  # what is made of two adapters, None: nothing; and its price
    "merge": (MERGED, 0.0),
    "learn": (LEARNED, 0.0),
    "route": (None, ROUTE),
    "retrain": (JOINT, RETRAIN),
}
MERGE, LEARN, SERVED, RETRAINED = range(len(CHOICES))
ROUTES = (0.1, 0.2, 0.3, 0.4, 0.5)  # other prices; retraining costs as much more as it does above
FORETOLD_BY = "rows"
MIDDLE = (10, 90)  # percentiles between which four of five lie
LEFT_OUT, SPLITS, SEED = 8, 200, 0
RIDGE = 1.0  # on standardised columns, beside one unit a pair
BINS = 5
ROUNDS = 50  # of fitting a curve
MEASURED = ("rows", "half")  # by a curve; what an older file lacks
USUAL = "usual"  # the choice that was best in the mean over the pairs fitted on, for all pairs alike
Array = np.ndarray


@dataclass(frozen=True)
class Pairs:
    """All pairs that were merged: their tasks, worth of each of CHOICES (pairs, choices; NaN where it was not tried),
    and what foretells that of merging, by name."""

    tasks: list[tuple[str, str]]
    worth: Array
    columns: dict[str, Array]


def main() -> None:
    """Prints the table and writes benchmarks/results/merge_verdict.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=record.RESULTS / "merge_quality.json")
    asked = parser.parse_args()
    try:
        held = gaining(json.loads(asked.input.read_text(encoding="utf-8")))
        pairs = read(held)
    except KeyError as error:
        sys.exit(f"{asked.input} lacks {error}; next: python -m benchmarks.merge_quality")
    result = {"methods": by_method(held)} | judged(pairs)
    if FORETOLD_BY in pairs.columns:
        result["fit"] = fitted(pairs)
    result["lost_by_price"] = by_price(pairs)
    result["learned_less_served"] = learned_less_served(pairs)
    if unfinished := sorted({name for found in held["pairs"].values() for name in found} - {*finished(held["pairs"])}):
        print(f"left out, not tried on all pairs yet: {', '.join(unfinished)}", file=sys.stderr)
    for line in (*methods_table(result["methods"]), "", *table(result), "", *prices_table(result["lost_by_price"])):
        print(line)
    record.save("merge_verdict", result)


def read(held: Mapping[str, Any]) -> Pairs:
    """From what was measured: every pair that was merged by MERGED."""
    merged = {pair: found for pair, found in sorted(held["pairs"].items()) if MERGED in found}
    worth = [[_worth(held, pair, found, *choice) for choice in CHOICES.values()] for pair, found in merged.items()]
    features = [held["features"][pair] for pair in merged]
    names = [name for name in features[0] if name not in ("first", "second", "layers")]
    columns = {
        "cosine": np.array([[one["cosine"]] for one in features]),
        "weights": np.array([[one[name] for name in names] for one in features], dtype=float),
    }
    if all("held" in held["base"][task] for pair in merged for task in pair.split(JOINED)):
        columns["rows"] = _on_rows(held, {pair: found[MERGED] for pair, found in merged.items()})
        half = {pair: {task: held["half"][task][task] for task in pair.split(JOINED)} for pair in merged}
        columns["half"] = _on_rows(held, half)
    return Pairs([tuple(pair.split(JOINED)) for pair in merged], np.array(worth), columns)


def _worth(held: Mapping[str, Any], pair: str, found: Mapping[str, Any], made: str | None, price: float) -> float:
    """Of a choice; NaN where it was not tried."""
    if made is None:
        return 1 - price
    return worse(held["base"], own(held, pair), found[made]) - price if made in found else float("nan")


def _on_rows(held: Mapping[str, Any], found: Mapping[str, Any]) -> Array:
    """Of each pair the smaller share of the gain in loss on held-out rows, as `log_lost`."""
    return np.array([[log_lost(worse_loss(held["base"], own(held, pair), one))] for pair, one in found.items()])


def by_price(pairs: Pairs) -> dict[str, dict[str, float]]:
    """What is lost beside the best choice by each predictor and by what never looks, by the price of routing in
    hundredths."""
    found = {}
    for route in ROUTES:
        worth = pairs.worth.copy()
        worth[:, SERVED] = 1 - route
        worth[:, RETRAINED] += ROUTE - route
        told = judged(replace(pairs, worth=worth))["predictors"]
        found[f"{100 * route:.0f}"] = {name: one["lost"] for name, one in told.items()}
    return found


def learned_less_served(pairs: Pairs) -> dict[str, dict[str, float]]:
    """What learned weights are worth beside serving both, with its 95 % interval over tasks, by the price of the
    latter in hundredths."""
    shares = {JOINED.join(pair): share for pair, share in zip(pairs.tasks, pairs.worth[:, LEARN], strict=True)}
    tried = {pair: share for pair, share in shares.items() if not np.isnan(share)}
    if not tried:
        return {}
    return {
        f"{100 * route:.0f}": over_tasks({p: share - (1 - route) for p, share in tried.items()}) for route in ROUTES
    }


def fitted(pairs: Pairs) -> dict[str, Any]:
    """The curve through all pairs by FORETOLD_BY; and of pairs of tasks that a curve was not fitted on, a third of them
    each from the lowest shares told to the highest: up to which share told, and how far off what was kept lay, MIDDLE
    of them."""
    x, share = pairs.columns[FORETOLD_BY], pairs.worth[:, MERGE]
    constant, slope = curve_through(x[:, 0], share)
    told, off = [], []
    for fit, test in splits_of(pairs.tasks):
        told.append(told_by(FORETOLD_BY, x[fit], share[fit], x[test]))
        off.append(share[test] - told[-1])
    tops = np.quantile(np.concatenate(told), [1 / 3, 2 / 3]).round(2).tolist()
    place = np.searchsorted(tops, np.concatenate(told))
    ranges = [np.percentile(np.concatenate(off)[place == third], MIDDLE).round(2).tolist() for third in range(3)]
    return {
        "constant": round(constant, 3),
        "slope": round(slope, 3),
        "off": [[top, *ends] for top, ends in zip([*tops, 1.0], ranges, strict=True)],
    }


def curve_through(x_P: Array, y_P: Array) -> tuple[float, float]:
    """Constant and slope of `share_kept` with the least squares, by Gauss-Newton with bounded steps."""
    found = np.zeros(2)
    for _ in range(ROUNDS):
        told = share_kept(x_P, *found)
        slopes_P2 = (told * (1 - told))[:, None] * np.stack([np.ones(len(x_P)), x_P], axis=1)
        found += np.clip(np.linalg.lstsq(slopes_P2, y_P - told, rcond=None)[0], -0.5, 0.5)
    return float(found[0]), float(found[1])


def splits_of(tasks: Sequence[tuple[str, str]]) -> Iterator[tuple[Array, Array]]:
    """Which pairs to fit on and which to judge on, of tasks drawn to be left out, SPLITS times."""
    draw = random.Random(SEED)
    names = sorted({task for pair in tasks for task in pair})
    for _ in range(SPLITS):
        out = set(draw.sample(names, min(LEFT_OUT, len(names) // 3)))
        fit = np.array([not out & set(pair) for pair in tasks])
        test = np.array([out >= set(pair) for pair in tasks])
        if fit.sum() > 2 and test.any():
            yield fit, test


def judged(pairs: Pairs) -> dict[str, Any]:
    """Each predictor over all splits, and what never looks."""
    tried = (~np.isnan(pairs.worth)).sum(0)
    too_few = tried <= len(pairs.tasks) // 10  # to say anything
    choices = {name: place for place, name in enumerate(CHOICES) if not too_few[place]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*pairs.columns, USUAL, *choices)}
    for fit, test in splits_of(pairs.tasks):
        worth = np.where(too_few, -np.inf, pairs.worth)
        usual = np.array([np.nanmean(one) if not np.isnan(one).all() else -np.inf for one in worth[fit].T])
        shared = {"usual": usual[MERGE], "worth": worth[test]}
        for name, columns in pairs.columns.items():
            told = told_by(name, columns[fit], worth[fit, MERGE], columns[test])
            known = np.tile(usual, (len(told), 1))
            known[:, MERGE] = told
            found[name].append({**shared, "told": told, "choice": known.argmax(1)})
        for name, place in {USUAL: int(usual.argmax()), **choices}.items():
            found[name].append({**shared, "choice": np.full(int(test.sum()), place)})
    return {
        "pairs": len(pairs.tasks),
        "tasks": len({task for pair in pairs.tasks for task in pair}),
        "splits": len(found["merge"]),
        "prices": {"route": ROUTE, "retrain": RETRAIN},
        "tried": dict(zip(CHOICES, tried.tolist(), strict=True)),
        "to_merge": int((pairs.worth[:, MERGE] > pairs.worth[:, SERVED]).sum()),
        "not_measured": [name for name in MEASURED if name not in pairs.columns],
        "predictors": {name: summed(splits) for name, splits in found.items()},
    }


def told_by(name: str, x_PC: Array, y_P: Array, new_QC: Array) -> Array:
    """By what was measured on rows: a curve through its one column; else by `ridge`."""
    if name in MEASURED:
        return np.asarray(share_kept(new_QC[:, 0], *curve_through(x_PC[:, 0], y_P)))
    return ridge(x_PC, y_P, new_QC)


def ridge(x_PC: Array, y_P: Array, new_QC: Array) -> Array:
    """Ridge regression on standardised columns, with a constant."""
    mean_C, scale_C = x_PC.mean(0), x_PC.std(0)
    scale_C[scale_C == 0] = 1.0
    x_PC, new_QC = (x_PC - mean_C) / scale_C, (new_QC - mean_C) / scale_C
    gram_CC = x_PC.T @ x_PC + RIDGE * np.eye(x_PC.shape[1])
    return y_P.mean() + new_QC @ np.linalg.solve(gram_CC, x_PC.T @ (y_P - y_P.mean()))


def summed(splits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was lost beside the best choice where all were tried, how often each was chosen; and of what was foretold:
    AUC (the mean over the splits in which merging is better than routing for some pairs and not for others),
    concordance with the share, squared error beside that of the mean of all pairs, calibration."""
    worth, choice = (np.concatenate([split[name] for split in splits]) for name in ("worth", "choice"))
    lost = worth.max(1) - worth[np.arange(len(worth)), choice]  # NaN where not all were tried
    chosen = {name: round(float((choice == place).mean()), 4) for place, name in enumerate(CHOICES)}
    found: dict[str, Any] = {"lost": round(float(np.nanmean(lost)), 4), "chosen": chosen}
    if "told" not in splits[0]:
        return found
    told, share = np.concatenate([split["told"] for split in splits]), worth[:, MERGE]
    usual = np.concatenate([np.full(len(split["told"]), split["usual"]) for split in splits])
    each = [auc(split["told"], split["worth"][:, MERGE] > split["worth"][:, SERVED]) for split in splits]
    both = [one for one in each if not np.isnan(one)]
    agreed, compared = np.sum([concordance(split["told"], split["worth"][:, MERGE]) for split in splits], axis=0)
    return found | {
        "auc": round(float(np.mean(both)), 4) if both else None,
        "auc_splits": len(both),
        "concordance": round(float(agreed / compared), 4) if compared else None,
        "squared_error": round(float(((told - share) ** 2).mean() / ((usual - share) ** 2).mean()), 4),
        "calibration_error": round(calibration(told, share), 4),
    }


def concordance(told: Array, share: Array) -> tuple[float, int]:
    """Of two pairs that keep different shares: how often more was told of the better one, and how many there are."""
    one, other = np.triu_indices(len(share), 1)
    differ = share[one] != share[other]
    agreed = (np.sign(told[one] - told[other]) * np.sign(share[one] - share[other]) + 1) / 2
    return float(agreed[differ].sum()), int(differ.sum())


def auc(told: Array, right: Array) -> float:
    """The chance that of a pair to merge and one not to, the former is told the higher share; NaN without both."""
    yes, no = told[right], told[~right]
    if not (len(yes) and len(no)):
        return float("nan")
    return float(((yes[:, None] > no) + 0.5 * (yes[:, None] == no)).mean())


def calibration(told: Array, share: Array) -> float:
    """|mean told - mean share| over BINS bins of equal size of what was told, their mean."""
    parts = np.array_split(np.argsort(told, kind="stable"), BINS)
    return float(np.mean([abs(told[part].mean() - share[part].mean()) for part in parts if len(part)]))


def table(result: Mapping[str, Any]) -> list[str]:
    """A row for each predictor, the best first."""
    lines = [f"{'told by':<10} {'AUC':>6} {'concord':>8} {'error':>6} {'off by':>7} {'lost':>7}   {', '.join(CHOICES)}"]
    for name, one in sorted(result["predictors"].items(), key=lambda item: item[1]["lost"]):
        figures = [one.get(name) for name in ("auc", "concordance", "squared_error", "calibration_error")]
        score, agreed, error, off = ("-" if one is None else f"{one:.3f}" for one in figures)
        chosen = ", ".join(f"{share:.0%}" for share in one["chosen"].values())
        lines.append(f"{name:<10} {score:>6} {agreed:>8} {error:>6} {off:>7} {one['lost']:>7.4f}   {chosen}")
    lines += [f"{name}: not measured" for name in result["not_measured"]]
    return lines


def prices_table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is lost: a row for each price of routing."""
    names = list(next(iter(found.values())))
    lines = ["lost at a price of routing of, in hundredths", f"{'':<6}" + "".join(f"{name:>9}" for name in names)]
    return lines + [f"{price:<6}" + "".join(f"{one[name]:>9.4f}" for name in names) for price, one in found.items()]


if __name__ == "__main__":
    main()
