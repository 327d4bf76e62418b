"""What an evaluation found, as plain values: scores, differences to the first slot, and a sample for each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from veneer.evaluate.intervals import Score

Outcome = Literal["broken", "fixed", "wrong", "right"]

DIFFERENCES = ("difference", "differences")


@dataclass(frozen=True)
class Sample:
    """One row: what was asked, what counts as right, and for each slot what it wrote and scored (by metric).

    With metrics of multiple choice also the choices, and what each slot gives them; without generated text, `texts` are
    the choices that the slots find likeliest.
    """

    prompt: str
    references: tuple[str, ...]
    texts: dict[str, str]
    scores: dict[str, dict[str, float]]
    choices: tuple[str, ...] = ()
    loglikelihoods: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def outcome(self, metric: str, before: str, after: str) -> Outcome:
        """What became of the row from slot `before` to slot `after`; right means a score of 1."""
        was, now = self.scores[metric][before] == 1.0, self.scores[metric][after] == 1.0
        if was:
            return "right" if now else "broken"
        return "fixed" if now else "wrong"

    def to_json(self) -> dict[str, Any]:
        """All that is there; nothing of choices where there are none."""
        return {name: value for name, value in asdict(self).items() if self.choices or name not in _OF_CHOICES}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Sample:
        """The Sample that `to_json` wrote."""
        given = {slot: tuple(values) for slot, values in found.get("loglikelihoods", {}).items()}
        tuples = {name: tuple(found.get(name, ())) for name in ("references", "choices")}
        return cls(**{**found, **tuples, "loglikelihoods": given})


_OF_CHOICES = ("choices", "loglikelihoods")


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    metrics      metric -> slot -> Score, slots in the order given
    differences  metric -> slot -> Score of slot minus first slot, paired; empty with one slot
    samples      one for each row if a metric of texts or choices was asked for; else empty
    rows         how many rows were scored
    settings     what must be the same for a second run to find the same
    notes        what the reader must be told
    """

    metrics: dict[str, dict[str, Score]]
    differences: dict[str, dict[str, Score]]
    samples: tuple[Sample, ...]
    rows: int
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self, examples: bool = True) -> dict[str, Any]:
        """{"metrics": {name: {slot: score, ..., "difference": score}}, "rows", "settings", "notes", "examples"}.

        With three slots or more, "differences": {slot: score} stands in for "difference".
        """
        found = {
            "metrics": {name: self._metric_json(name) for name in self.metrics},
            "rows": self.rows,
            "settings": self.settings,
            "notes": list(self.notes),
        }
        return found | ({"examples": [sample.to_json() for sample in self.samples]} if examples else {})

    def _metric_json(self, name: str) -> dict[str, Any]:
        slots = {slot: score.to_json() for slot, score in self.metrics[name].items()}
        against = {slot: score.to_json() for slot, score in self.differences[name].items()}
        if len(against) == 1:
            return slots | {"difference": next(iter(against.values()))}
        return slots | ({"differences": against} if against else {})

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Result:
        """The Result that `to_json` wrote."""
        scores = {
            name: {slot: Score(**one) for slot, one in slots.items() if slot not in DIFFERENCES}
            for name, slots in found["metrics"].items()
        }
        differences = {}
        for name, slots in found["metrics"].items():
            several = slots.get("differences", {})
            single = {list(scores[name])[-1]: slots["difference"]} if "difference" in slots else {}
            differences[name] = {slot: Score(**one) for slot, one in {**single, **several}.items()}
        samples = tuple(Sample.from_json(sample) for sample in found.get("examples", ()))
        return cls(scores, differences, samples, found["rows"], dict(found["settings"]), tuple(found["notes"]))
