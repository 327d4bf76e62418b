"""What can be measured: the table METRICS of what compares texts, and the names of what comes from likelihoods.

A member of METRICS maps (predictions, references) to one score a row, in [0, 1], whose mean is the score. A corpus
metric, whose score is no mean of rows, is a TextMetric: beside its rows it gives statistics that add up, and what
their sums score. A name with a colon is a function of the user's own: see `veneer.evaluate.plugin`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from veneer.errors import ConfigError, nearest
from veneer.evaluate.intervals import MEAN, PERPLEXITY, RATIO, Statistics, Summary, weighted

METRICS: dict[str, str] = {
    "exact_match": "veneer.evaluate.metrics:exact_match",
    "accuracy": "veneer.evaluate.metrics:accuracy",
    "bleu": "veneer.evaluate.bleu:bleu",
    "chrf": "veneer.evaluate.bleu:chrf",
    "rouge1": "veneer.evaluate.rouge:rouge1",
    "rouge2": "veneer.evaluate.rouge:rouge2",
    "rouge_l": "veneer.evaluate.rouge:rouge_l",
}

# Teacher-forced: what the model gives the tokens of the reference, by nats (loss, perplexity = exp(loss)) or by how
# many of them are the likeliest token. Rows weigh as much as they have tokens.
LIKELIHOOD: dict[str, Summary] = {"loss": RATIO, "perplexity": PERPLEXITY, "token_accuracy": MEAN}

# Of rows with `choices`: is the right one the likeliest, by its log-likelihood, or by that over its characters.
CHOICE = ("choice_accuracy", "choice_accuracy_norm")

LOWER_IS_BETTER = ("loss", "perplexity")

RowScores = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]


@dataclass(frozen=True)
class TextMetric:
    """A metric of texts: what each row scores alone, and how rows make one score (by default as the mean of those)."""

    rows: RowScores
    summary: Summary = MEAN
    of_rows: Callable[[Sequence[str], Sequence[Sequence[str]]], Statistics] | None = None

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """One score a row."""
        return self.rows(predictions, references)

    def statistics(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], rows: Sequence[float]
    ) -> Statistics:
        """What `summary` adds up; `rows` are the scores of the rows."""
        return self.of_rows(predictions, references) if self.of_rows else weighted(rows)


def is_own(name: str) -> bool:
    """Whether the name stands for a function of the user's own, `file.py:function` or `module:function`."""
    return ":" in name


def is_share(name: str) -> bool:
    """Whether the metric lies between 0 and 1, so that it may be shown as per cent."""
    return name in METRICS or name in CHOICE or (name in LIKELIHOOD and LIKELIHOOD[name].bounds == (0.0, 1.0))


def check_names(names: Sequence[str]) -> None:
    """ConfigError that lists every name that is no metric, each with the nearest ones; loads the user's own."""
    known = [*METRICS, *LIKELIHOOD, *CHOICE]
    faults = [
        f"unknown metric {name!r}" + (f", did you mean {' or '.join(near)}?" if (near := nearest(name, known)) else "")
        for name in names
        if name not in known and not is_own(name)
    ]
    faults += [f"the metric {name} is named twice" for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if faults:
        own = "or a function of your own, as file.py:function"
        raise ConfigError("; ".join(faults) + f" Known metrics: {', '.join(known)}, {own}.")
    for name in filter(is_own, names):
        metric(name)


def metric(name: str) -> TextMetric:
    """The text metric called `name`; ConfigError with the nearest names otherwise."""
    if is_own(name):
        from veneer.evaluate.plugin import own_metric

        return TextMetric(own_metric(name), RATIO)
    check_names([name])
    if name not in METRICS:
        raise ConfigError(f"{name!r} is measured from likelihoods, not from text. Text metrics: {', '.join(METRICS)}.")
    module, function = METRICS[name].split(":")
    found = getattr(importlib.import_module(module), function)
    return found if isinstance(found, TextMetric) else TextMetric(found)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 where the whole text, stripped, equals any reference, stripped; else 0."""
    return _any_equal(predictions, references, str.strip)


def accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 where the text is any reference's label, else 0; case, white space and a final full stop do not count."""
    return _any_equal(predictions, references, _label)


def _any_equal(
    predictions: Sequence[str], references: Sequence[Sequence[str]], form: Callable[[str], str]
) -> list[float]:
    pairs = zip(predictions, references, strict=True)
    return [float(form(text) in {form(reference) for reference in wanted}) for text, wanted in pairs]


def _label(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()
