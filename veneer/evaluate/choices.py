"""Multiple choice by likelihood: which of a row's `choices` a model finds likeliest as the reply to its question.

Every choice stands in the place of the reply, by the chat template, and its tokens alone are scored, without the
template's end of turn: Σ log p (`choice_accuracy`, lm-evaluation-harness' `acc`), or that over the number of characters
of the choice (`choice_accuracy_norm`, its `acc_norm`). The question is computed once for all its choices, since they
stand side by side in the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.data.chat import Conversation, Example, Template
from veneer.data.choices import Choices, read_choices
from veneer.data.files import read_each, shortened
from veneer.errors import DataError, listed
from veneer.model.likelihood import Likelihood

WANTED = (
    "Wanted: `question` (or `prompt`), `choices`, a list of texts, and `answer`, the right one's place from 0, its "
    "letter, or its text."
)


@dataclass(frozen=True)
class Question:
    """A row's choices, each as the tokens to score, beside one another."""

    choices: Choices
    examples: tuple[Example, ...]

    def score(self, loglikelihoods: Sequence[float], name: str) -> float:
        """1 where the likeliest choice is the right one, else 0."""
        return float(self.picked(loglikelihoods, name) == self.choices.right)

    def picked(self, loglikelihoods: Sequence[float], name: str) -> str:
        """The likeliest choice, of equals the first, as `choice_accuracy` or `choice_accuracy_norm` sees it."""
        texts = self.choices.texts
        lengths = [len(text) if name == "choice_accuracy_norm" else 1 for text in texts]
        return max(zip(loglikelihoods, lengths, texts, strict=True), key=lambda one: one[0] / one[1])[2]


def read_questions(
    rows: Sequence[Mapping[str, Any]],
    conversations: Sequence[Conversation],
    template: Template,
    max_length: int,
    where: str,
) -> list[Question]:
    """The question in every row; DataError lists every row without, and every choice that cannot be scored whole."""
    unread: dict[int, str] = {}
    found = read_each(rows, read_choices, unread)
    faults = [f"row {index + 1}: {reason}" for index, reason in unread.items()]
    owners = [(index, text) for index, choices in found.items() for text in choices.texts]
    refused: dict[int, str] = {}
    answered = {i: _answered(conversations[index], text) for i, (index, text) in enumerate(owners)}
    # A little more than may be, so that one which is cut is seen.
    encoded = {example.row: example for example in template.encode_all(answered, max_length + 1, refused)}
    for i, example in encoded.items():
        if len(example.input_ids) > max_length:
            refused[i] = f"longer than {max_length:,} tokens"
    faults += [f"row {owners[i][0] + 1}, choice {owners[i][1]!r}: {refused[i]}" for i in sorted(refused)]
    if faults:
        raise DataError(
            listed(f"{where}: multiple choice needs choices in every row; faults:", shortened(faults), WANTED)
        )
    examples = iter([replace(_open(encoded[i], template), row=index) for i, (index, _) in enumerate(owners)])
    return [Question(choices, tuple(next(examples) for _ in choices.texts)) for choices in found.values()]


def loglikelihoods(questions: Sequence[Question], scored: Sequence[Likelihood]) -> list[tuple[float, ...]]:
    """For each question the log-likelihoods of its choices, from those of all examples in a row."""
    values = iter([-one.nll for one in scored])
    return [tuple(next(values) for _ in question.examples) for question in questions]


def _answered(conv: Conversation, text: str) -> Conversation:
    reply = {**conv.messages[-1], "content": text}
    return replace(conv, messages=(*conv.messages[:-1], reply), layout="prompt_completion")


def _open(example: Example, template: Template) -> Example:
    """The example without the template's end of turn, which says nothing of the choice."""
    end = len(example.input_ids)
    while template.is_special(example.input_ids[end - 1]):
        end -= 1
    return replace(example, input_ids=example.input_ids[:end], targets=example.targets[:end])
