"""Base and adapters on the same rows: text metrics by greedy generation, loss and perplexity by teacher forcing.

The first slot is what the others are compared with; every difference is paired, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from veneer.data.chat import Conversation, Template, conversation
from veneer.data.encode import encode, family_of
from veneer.data.examples import Example
from veneer.data.files import shortened
from veneer.data.preference import chosen_alone
from veneer.errors import ConfigError, DataError, ModelError, listed
from veneer.evaluate import metrics as measures
from veneer.evaluate.metrics import LIKELIHOOD, Score
from veneer.model.generate import generate as plain_generate
from veneer.model.losses import sequence_nll as plain_sequence_nll

Outcome = Literal["broken", "fixed", "wrong", "right"]

BASE_AND_ADAPTER: Mapping[str, str | None] = {"base": None, "adapter": "default"}
DIFFERENCES = ("difference", "differences")


@dataclass(frozen=True)
class Sample:
    """One row: what was asked, what counts as right, and for each slot what it wrote and scored (by metric)."""

    prompt: str
    references: tuple[str, ...]
    texts: dict[str, str]
    scores: dict[str, dict[str, float]]

    def outcome(self, metric: str, before: str, after: str) -> Outcome:
        """What became of the row from slot `before` to slot `after`; right means a score of 1."""
        was, now = self.scores[metric][before] == 1.0, self.scores[metric][after] == 1.0
        if was:
            return "right" if now else "broken"
        return "fixed" if now else "wrong"


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    metrics      metric -> slot -> Score, slots in the order given
    differences  metric -> slot -> Score of slot minus first slot, paired; empty with one slot
    samples      one for each row, with texts if a text metric was asked for; else empty
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
        return found | ({"examples": [asdict(sample) for sample in self.samples]} if examples else {})

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
        samples = tuple(
            Sample(**{**sample, "references": tuple(sample["references"])}) for sample in found.get("examples", ())
        )
        return cls(scores, differences, samples, found["rows"], dict(found["settings"]), tuple(found["notes"]))


def evaluate(
    loaded: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    slots: Mapping[str, str | None] = BASE_AND_ADAPTER,
    metrics: Sequence[str] = LIKELIHOOD,
    max_new_tokens: int = 128,
    max_length: int = 1024,
    batch_size: int = 16,
    seed: int = 0,
    system_prompt: str | None = None,
    where: str = "the data",
    generate: Callable[..., list[str]] = plain_generate,
    sequence_nll: Callable[..., Sequence[tuple[float, int]]] = plain_sequence_nll,
    progress: Callable[[str], None] = lambda message: None,
) -> Result:
    """Score each slot of `loaded` (model, tokenizer, name) on `rows`.

    slots     label -> slot of the model, None for the base alone; the first is the one compared with
    metrics   names from METRICS (generated greedily, up to `max_new_tokens`) or LIKELIHOOD (no text is generated)
    seed      of the bootstrap
    where     names the data in messages
    progress  told in words before each long step

    Raises ConfigError (metrics, slots), DataError (rows: all faults listed) and ModelError (a loss that is not
    finite), all but the last before any work is done.
    """
    _check(slots, metrics, where, rows)
    _check_family(rows, metrics, where)
    template = Template(loaded.tokenizer, system_prompt)
    text_metrics = [name for name in metrics if name not in LIKELIHOOD]
    conversations = _conversations(rows, template, where) if text_metrics else []
    prompts = [template.prompt_ids(conv) for conv in conversations]
    notes = (*template.notes, *_instruction_note(rows))
    nll: dict[str, Sequence[tuple[float, int]]] = {}
    if len(text_metrics) < len(metrics):
        encoded = encode(rows, template, max_length, where)
        notes = encoded.notes
        nll = _likelihoods(loaded, encoded.examples, slots, sequence_nll, progress)
    texts: dict[str, list[str]] = {}
    for label, slot in slots.items() if text_metrics else ():
        progress(f"{label}: generating {len(prompts):,} answers")
        texts[label] = generate(
            loaded.model, loaded.tokenizer, prompts, slot, max_new_tokens, temperature=0.0, batch_size=batch_size
        )
    samples = _samples(conversations, texts, text_metrics) if text_metrics else ()
    scores, differences = _scored(metrics, list(slots), samples, nll, seed)
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
    return Result(scores, differences, samples, len(rows), settings, notes)


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


def _check_family(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], where: str) -> None:
    """Raises DataError for metrics that such rows cannot have."""
    family, unfit = family_of(rows), [name for name in metrics if name not in LIKELIHOOD]
    if family == "preference":
        raise DataError(
            f"{where} holds preference pairs, `chosen` and `rejected`, which no metric reads. Next: name one side, "
            f"{chosen_alone(rows[0])}."
        )
    if family == "text" and unfit:
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


def _instruction_note(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    count = sum(bool(row.get("instruction")) for row in rows)
    return (
        [f"`instruction` stands before the prompt in {count:,} rows, as {{instruction}}\\n\\n{{prompt}}"]
        if count
        else []
    )


def _likelihoods(
    loaded: Any,
    examples: Sequence[Example],
    slots: Mapping[str, str | None],
    sequence_nll: Callable[..., Sequence[tuple[float, int]]],
    progress: Callable[[str], None],
) -> dict[str, Sequence[tuple[float, int]]]:
    """Slot -> for each row the summed negative log-likelihood in nats and the number of target tokens."""
    nll = {}
    for label, slot in slots.items():
        progress(f"{label}: loss of {len(examples):,} rows")
        nll[label] = sequence_nll(loaded.model, examples, slot)
        broken = [str(number) for number, (total, _) in enumerate(nll[label], start=1) if not math.isfinite(total)]
        if broken:
            raise ModelError(
                f"the loss of {label!r} is not finite on {len(broken):,} of {len(examples):,} rows (row "
                f"{', '.join(shortened(broken))}). Look for NaN or infinity in its weights, or evaluate in float32."
            )
    return nll


def _samples(
    conversations: Sequence[Conversation], texts: Mapping[str, Sequence[str]], metrics: Sequence[str]
) -> tuple[Sample, ...]:
    references = [conv.references for conv in conversations]
    scored = {
        name: {label: measures.metric(name)(answers, references) for label, answers in texts.items()}
        for name in metrics
    }
    return tuple(
        Sample(
            prompt=_prompt_text(conv),
            references=conv.references,
            texts={label: answers[row] for label, answers in texts.items()},
            scores={name: {label: values[row] for label, values in slots.items()} for name, slots in scored.items()},
        )
        for row, conv in enumerate(conversations)
    )


def _prompt_text(conv: Conversation) -> str:
    """What a reader needs to see: the one message before the answer, or all of them with their roles."""
    before = conv.messages[:-1]
    if len(before) == 1:
        return before[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in before)


def _scored(
    metrics: Sequence[str],
    labels: Sequence[str],
    samples: Sequence[Sample],
    nll: Mapping[str, Sequence[tuple[float, int]]],
    seed: int,
) -> tuple[dict[str, dict[str, Score]], dict[str, dict[str, Score]]]:
    """Scores, and differences to the first slot, by metric and slot."""
    scores: dict[str, dict[str, Score]] = {}
    differences: dict[str, dict[str, Score]] = {}
    for name in metrics:
        single, pair, values = _measured(name, labels, samples, nll, seed)
        scores[name] = {label: single(values[label]) for label in labels}
        differences[name] = {label: pair(values[label], values[labels[0]]) for label in labels[1:]}
    return scores, differences


def _measured(
    name: str,
    labels: Sequence[str],
    samples: Sequence[Sample],
    nll: Mapping[str, Sequence[tuple[float, int]]],
    seed: int,
) -> tuple[Callable[..., Score], Callable[..., Score], dict[str, list[float]]]:
    """How to score one slot, how to compare two, and each slot's value for every row."""
    if name not in LIKELIHOOD:
        values = {label: [sample.scores[name][label] for sample in samples] for label in labels}
        return partial(measures.score, seed=seed), partial(measures.paired_difference, seed=seed), values
    values = {label: [total for total, _ in nll[label]] for label in labels}
    tokens = [count for _, count in nll[labels[0]]]
    single = {"loss": measures.loss, "perplexity": measures.perplexity}[name]
    pair = {"loss": measures.loss_difference, "perplexity": measures.perplexity_difference}[name]
    return partial(single, tokens=tokens, seed=seed), partial(pair, tokens=tokens, seed=seed), values
