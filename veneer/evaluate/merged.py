"""A merged adapter beside each of its parents and the base, on the rows of each parent: what `veneer merge` reports.

It stands first in every table, so that what others have "less merged" is paired, row by row. The best single adapter is
the parent that does best on all files together by the first metric: what to keep instead of a merge, if only one may
be kept. It is chosen on the rows that it is compared on, which favours it, never the merge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from veneer.adapter.card import Adapter
from veneer.evaluate.intervals import Score
from veneer.evaluate.labels import labels_of
from veneer.evaluate.metrics import LOWER_IS_BETTER
from veneer.evaluate.result import DIFFERENCES, Result
from veneer.evaluate.run import evaluate
from veneer.evaluate.table import markdown
from veneer.merge.data import ParentRows
from veneer.merge.on_base import MERGED, OnBase

COMPARISON = "comparison"
BASE = "base"


@dataclass(frozen=True)
class Compared:
    """What was found on each parent's file, in the parents' order.

    labels: of the parents. sha256: of the files. best: label of the best single adapter.
    """

    labels: tuple[str, ...]
    files: tuple[str, ...]
    sha256: tuple[str, ...]
    results: tuple[Result, ...]
    best: str

    @property
    def metric(self) -> str:
        """By which the best single adapter was chosen."""
        return next(iter(self.results[0].metrics))

    def means(self) -> dict[str, dict[str, float]]:
        """Metric -> model -> mean over the files, each of which counts the same."""
        return {name: _means(self.results, name) for name in self.results[0].metrics}

    def verdicts(self) -> list[str]:
        """A sentence for each file: the merge beside the file's own parent, the best single adapter and the base."""
        return [
            f"{file}: merged is {'; '.join(self._beside(result, own))}"
            for file, own, result in zip(self.files, self.labels, self.results, strict=True)
        ]

    def _beside(self, result: Result, own: str) -> list[str]:
        others = {
            own: f"its own adapter {own}",
            self.best: f"{self.best}, the best single adapter over all files",
            BASE: "the base",
        }
        if own == self.best:
            others[own] = f"its own adapter {own}, the best single one over all files"
        found = result.differences[self.metric]
        return [f"{_word(self.metric, found[label])} {told}" for label, told in others.items()]

    def worse_than_own(self) -> list[str]:
        """Labels of the parents than which the merge is surely worse on their own files."""
        found = zip(self.labels, self.results, strict=True)
        return [own for own, result in found if _better(self.metric, result.differences[self.metric][own]) is False]

    def to_json(self) -> dict[str, Any]:
        files = [
            {"file": file, "sha256": sha256, "adapter": label, **_plain(result)}
            for file, sha256, label, result in zip(self.files, self.sha256, self.labels, self.results, strict=True)
        ]
        best = {"adapter": self.best, "by": self.metric}
        told = {"verdicts": self.verdicts(), "worse_than_own": self.worse_than_own()}
        return {"files": files, "means": self.means(), "best_single_adapter": best, **told}

    def written(self, shown: Callable[[Any], str]) -> dict[str, str]:
        """File name -> text: all of it as JSON, the tables as Markdown."""
        found = self.to_json()
        tables = [markdown(one, shown) for one in found["files"]]
        text = "\n".join([*tables, "\n".join(f"- {line}" for line in found["verdicts"]), ""])
        whole = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
        return {f"{COMPARISON}.json": whole, f"{COMPARISON}.md": text}


def compare_merged(
    on_base: OnBase,
    adapters: Sequence[Adapter],
    folders: Sequence[str],
    rows: Sequence[ParentRows],
    metrics: Sequence[str],
    progress: Callable[[str], None] = lambda message: None,
) -> Compared:
    """Scores all of them on the held-out rows of each file, read as the file's own parent was trained to read.

    on_base: with the merged adapter in the slot MERGED. Raises what `evaluate` raises.
    """
    labels = labels_of(folders, {MERGED, BASE, *DIFFERENCES})
    slots = {MERGED: MERGED, BASE: None, **dict(zip(labels, on_base.slots, strict=True))}
    results = []
    for label, adapter, one in zip(labels, adapters, rows, strict=True):
        progress(f"{one.name}, the file of {label}:")
        results.append(
            evaluate(
                on_base.loaded,
                one.held_out,
                slots=slots,
                metrics=metrics,
                max_length=one.max_length,
                system_prompt=adapter.card.system_prompt,
                where=f"{one.name} (of {label})",
                progress=progress,
            )
        )
    means, first = _means(results, metrics[0]), metrics[0]
    best = (min if first in LOWER_IS_BETTER else max)(labels, key=means.__getitem__)
    names, hashes = tuple(one.name for one in rows), tuple(one.sha256 for one in rows)
    return Compared(tuple(labels), names, hashes, tuple(results), best)


def _plain(result: Result) -> dict[str, Any]:
    """Without what is of this machine alone: folders, names of slots."""
    found = result.to_json(examples=False)
    told = {name: value for name, value in found["settings"].items() if name != "slots"}
    return found | {"settings": told | {"base_model": Path(told["base_model"]).name}}


def _means(results: Sequence[Result], metric: str) -> dict[str, float]:
    models = results[0].metrics[metric]
    return {model: fmean(result.metrics[metric][model].score for result in results) for model in models}


def _word(metric: str, other: Score) -> str:
    """What the merge is beside another, of whom the score less the merge's is given."""
    words = {None: "not told apart ({}) from", True: "better by {} than", False: "worse by {} than"}
    return words[_better(metric, other)].format(f"{abs(other.score):.3g}")


def _better(metric: str, other: Score) -> bool | None:
    """Whether the merge is better, by the other's score less its own; None where that is not sure."""
    if other.low is None or other.high is None or other.low <= 0 <= other.high:
        return None
    return (other.score > 0) == (metric in LOWER_IS_BETTER)
