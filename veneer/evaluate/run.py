"""Base and adapters on the same rows: text metrics by greedy generation, the others by teacher forcing.

The first slot is what the others are compared with; every difference is paired, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from veneer.config.values import MAX_LENGTH
from veneer.data.chat import Conversation, Template, conversation, reading_notes
from veneer.data.encode import encode, family_of
from veneer.data.files import shortened
from veneer.data.preference import refuse_pairs
from veneer.errors import ConfigError, DataError, listed
from veneer.evaluate import forced
from veneer.evaluate import metrics as measures
from veneer.evaluate.choices import Question, read_questions
from veneer.evaluate.forced import Likelihoods
from veneer.evaluate.intervals import MEAN, Measured, weighted
from veneer.evaluate.metrics import CHOICE, LIKELIHOOD
from veneer.evaluate.reading import check_whole, for_each, reading_note, templates_of
from veneer.evaluate.result import DIFFERENCES, Result, Sample
from veneer.model.generate import generate as plain_generate
from veneer.model.likelihood import sequence_likelihoods

__all__ = ["BASE_AND_ADAPTER", "Result", "Sample", "evaluate"]

BASE_AND_ADAPTER: Mapping[str, str | None] = {"base": None, "adapter": "default"}


def evaluate(
    loaded: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    slots: Mapping[str, str | None] = BASE_AND_ADAPTER,
    metrics: Sequence[str] = ("loss", "perplexity"),
    max_new_tokens: int = 128,
    max_length: int = MAX_LENGTH,
    batch_size: int = 16,
    seed: int = 0,
    system_prompt: str | None = None,
    where: str = "the data",
    generate: Callable[..., list[str]] = plain_generate,
    likelihoods: Likelihoods = sequence_likelihoods,
    progress: Callable[[str], None] = lambda message: None,
) -> Result:
    """Score each slot of `loaded` (model, tokenizer, name) on `rows`.

    slots     label -> slot of the model, None for the base alone; the first is the one compared with
    metrics   names from METRICS or a function of one's own (generated greedily, up to `max_new_tokens`), LIKELIHOOD
              (no text is generated) or CHOICE (rows with `choices`)
    seed      of the bootstrap
    where     names the data in messages
    progress  told in words before each long step

    Raises ConfigError (metrics, slots), DataError (rows: all faults listed) and ModelError (a loss that is not
    finite), all but the last before any work is done.
    """
    _check(slots, metrics, where, rows)
    check_family(rows, metrics, where)
    of_text = [name for name in metrics if name not in LIKELIHOOD and name not in CHOICE]
    of_tokens = [name for name in metrics if name in LIKELIHOOD]
    of_choices = [name for name in metrics if name in CHOICE]
    templates = templates_of(loaded, slots, system_prompt)
    template = next(iter(templates.values()))
    conversations = _conversations(rows, template, where) if of_text or of_choices else []
    _try(of_text, conversations)
    prompts = for_each(templates, lambda t: [t.prompt_ids(conv) for conv in conversations]) if of_text else {}
    asked = (
        for_each(templates, lambda t: read_questions(rows, conversations, t, max_length, where)) if of_choices else {}
    )
    questions = next(iter(asked.values()), [])
    encoded = for_each(templates, lambda t: encode(rows, t, max_length, where)) if of_tokens else {}
    check_whole(encoded, max_length, where)

    measured: dict[str, Measured] = {}
    if encoded:
        examples = {label: each.examples for label, each in encoded.items()}
        found = forced.likelihoods_of(loaded, examples, slots, likelihoods, progress)
        measured |= {name: forced.of_tokens(name, found) for name in of_tokens}
    given = forced.choices_of(loaded, asked, slots, likelihoods, progress) if questions else {}
    by_row = {name: forced.right_choices(name, questions, given) for name in of_choices}
    measured |= {name: Measured(MEAN, {slot: weighted(row) for slot, row in by_row[name].items()}) for name in by_row}
    texts: dict[str, list[str]] = {}
    for label, slot in slots.items() if of_text else ():
        tokenizer, starts = templates[label].tokenizer, prompts[label]
        progress(f"{label}: generating {len(starts):,} answers")
        texts[label] = generate(
            loaded.model, tokenizer, starts, slot, max_new_tokens, temperature=0.0, batch_size=batch_size
        )
    for name in of_text:
        by_row[name], measured[name] = _compared(name, texts, [conv.references for conv in conversations])
    shown = texts or (_picked(of_choices[0], questions, given) if questions else {})
    settings = {
        "base_model": loaded.name,
        "storage": loaded.storage,
        "dataset": where,
        "slots": dict(slots),
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "system_prompt": system_prompt,
        "seed": seed,
    }
    return Result(
        {name: measured[name].scores(seed) for name in metrics},
        {name: measured[name].differences(seed) for name in metrics},
        _samples(conversations, shown, by_row, questions, given) if by_row else (),
        len(rows),
        settings,
        (
            *(next(iter(encoded.values())).notes if encoded else (*template.notes, *reading_notes(rows))),
            *(reading_note(templates) if of_tokens else ()),
        ),
    )


def _check(
    slots: Mapping[str, str | None], metrics: Sequence[str], where: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    measures.check_names(metrics)
    faults = [f"a slot may not be called {label!r}" for label in slots if label in DIFFERENCES or not label.strip()]
    faults += [] if slots else ["no slot to evaluate, wanted at least one, such as {'base': None}"]
    faults += [] if metrics else ["no metric, wanted at least one, such as 'loss'"]
    if faults:
        raise ConfigError(listed("Cannot evaluate:", faults))
    if not rows:
        raise DataError(f"{where} has no rows: nothing to evaluate on. Give a file with at least one row.")


def check_family(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], where: str) -> None:
    """Raises DataError for metrics that such rows cannot have."""
    refuse_pairs(rows, where, "no metric reads")
    unfit = [name for name in metrics if name not in LIKELIHOOD]
    if family_of(rows) == "text" and unfit:
        raise DataError(
            f"{where} is text without answers, so that {', '.join(unfit)} cannot be measured. Next: --metrics loss,"
            "perplexity."
        )


def _conversations(rows: Sequence[Mapping[str, Any]], template: Template, where: str) -> list[Conversation]:
    """Every row as a conversation, with what counts as right: of a call of tools, how the template spells it."""
    found, faults = [], []
    for number, row in enumerate(rows, start=1):
        try:
            conv = conversation(row, f"row {number}")
            found.append(conv if conv.references else replace(conv, references=(template.reply(conv),)))
        except DataError as error:
            faults.append(" ".join(str(error).split()))
    if faults:
        raise DataError(listed(f"{where}: {len(faults):,} of {len(rows):,} rows cannot be used:", shortened(faults)))
    return found


def _try(names: Sequence[str], conversations: Sequence[Conversation]) -> None:
    """Right answers through every text metric: better it fails now than after all is generated. A function of the
    user's own, which may be slow, sees one row."""
    for name in names:
        rows = conversations[:1] if measures.is_own(name) else conversations
        measures.metric(name)([conv.references[0] for conv in rows], [conv.references for conv in rows])


def _compared(
    name: str, texts: Mapping[str, Sequence[str]], references: Sequence[Sequence[str]]
) -> tuple[dict[str, list[float]], Measured]:
    """Of a text metric: slot -> what each row scores, and what that makes of all rows."""
    metric = measures.metric(name)
    rows = {label: metric(answers, references) for label, answers in texts.items()}
    statistics = {label: metric.statistics(answers, references, rows[label]) for label, answers in texts.items()}
    return rows, Measured(metric.summary, statistics)


def _picked(
    name: str, questions: Sequence[Question], given: Mapping[str, Sequence[tuple[float, ...]]]
) -> dict[str, list[str]]:
    return {
        label: [question.picked(values, name) for question, values in zip(questions, rows, strict=True)]
        for label, rows in given.items()
    }


def _samples(
    conversations: Sequence[Conversation],
    texts: Mapping[str, Sequence[str]],
    by_row: Mapping[str, Mapping[str, Sequence[float]]],
    questions: Sequence[Question],
    given: Mapping[str, Sequence[tuple[float, ...]]],
) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            prompt=_prompt_text(conv),
            references=conv.references,
            texts={label: answers[row] for label, answers in texts.items()},
            scores={name: {label: values[row] for label, values in slots.items()} for name, slots in by_row.items()},
            choices=questions[row].choices.texts if questions else (),
            loglikelihoods={label: values[row] for label, values in given.items()},
        )
        for row, conv in enumerate(conversations)
    )


def _prompt_text(conv: Conversation) -> str:
    """What a reader needs to see: the one message before the answer, or all of them with their roles."""
    before = conv.messages[:-1]
    if len(before) == 1:
        return before[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in before)
