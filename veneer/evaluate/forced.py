"""Teacher forcing: what each slot gives the tokens of the answers and of the choices, and the metrics of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.data.chat import Example
from veneer.data.files import shortened
from veneer.errors import ModelError
from veneer.evaluate.choices import Question, loglikelihoods
from veneer.evaluate.intervals import Measured, weighted
from veneer.evaluate.metrics import LIKELIHOOD
from veneer.model.likelihood import Likelihood

Likelihoods = Callable[..., Sequence[Likelihood]]
Slots = Mapping[str, str | None]
Progress = Callable[[str], None]


def likelihoods_of(
    loaded: Any, examples: Mapping[str, Sequence[Example]], slots: Slots, likelihoods: Likelihoods, progress: Progress
) -> dict[str, Sequence[Likelihood]]:
    """Slot -> the likelihood of each row's answer. Raises ModelError where one is not finite.

    examples: of each slot, in its own tokens.
    """
    found = {}
    for label, slot in slots.items():
        progress(f"{label}: loss of {len(examples[label]):,} rows")
        found[label] = _finite(label, examples[label], likelihoods(loaded.model, examples[label], slot))
    return found


def choices_of(
    loaded: Any, questions: Mapping[str, Sequence[Question]], slots: Slots, likelihoods: Likelihoods, progress: Progress
) -> dict[str, list[tuple[float, ...]]]:
    """Slot -> for each question the log-likelihoods of its choices. Raises ModelError where one is not finite."""
    found = {}
    for label, slot in slots.items():
        examples = [example for question in questions[label] for example in question.examples]
        progress(f"{label}: choices of {len(questions[label]):,} rows")
        found[label] = loglikelihoods(
            questions[label], _finite(label, examples, likelihoods(loaded.model, examples, slot))
        )
    return found


def of_tokens(name: str, found: Mapping[str, Sequence[Likelihood]]) -> Measured:
    """A metric of LIKELIHOOD, from the likelihoods of each slot; nats are per token of the first one."""
    first = next(iter(found.values()))
    own: dict[str, tuple[list[float], list[int]]]
    if name == "token_accuracy":
        own = {label: ([one.hits for one in scored], [one.tokens for one in scored]) for label, scored in found.items()}
    else:
        own = {label: ([one.nll for one in scored], [one.tokens for one in first]) for label, scored in found.items()}
    statistics = {label: weighted(*columns) for label, columns in own.items()}
    return Measured(LIKELIHOOD[name], statistics)


def right_choices(
    name: str, questions: Sequence[Question], given: Mapping[str, Sequence[tuple[float, ...]]]
) -> dict[str, list[float]]:
    """Slot -> for each question 1 where the right choice is the likeliest, else 0."""
    return {
        label: [question.score(values, name) for question, values in zip(questions, rows, strict=True)]
        for label, rows in given.items()
    }


def _finite(label: str, examples: Sequence[Example], scored: Sequence[Likelihood]) -> Sequence[Likelihood]:
    pairs = zip(examples, scored, strict=True)
    broken = sorted({example.row + 1 for example, one in pairs if not math.isfinite(one.nll)})
    if broken:
        rows = len({example.row for example in examples})
        raise ModelError(
            f"the loss of {label!r} is not finite on {len(broken):,} of {rows:,} rows (row "
            f"{', '.join(shortened(list(map(str, broken))))}). Look for NaN or infinity in its weights, or evaluate in "
            "float32."
        )
    return scored
