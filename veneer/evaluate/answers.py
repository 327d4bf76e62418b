"""Cards of what was asked, wanted and answered, before and after; picked by kind without a script.

A metric of right and wrong sorts rows into fixed and broken; where there is only one that grades (ROUGE), they are
better or worse, the largest change first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

from veneer.evaluate.page import text
from veneer.evaluate.result import Outcome, Result, Sample

SAMPLES_EACH = 8  # cards shown of each outcome; the counts are of all
LONGEST_TEXT = 1200  # characters of a text that are shown
OUTCOMES: dict[Outcome, str] = {
    "fixed": "fixed",
    "broken": "broken",
    "wrong": "still wrong",
    "right": "right before and after",
}
GRADED: dict[Outcome, str] = {"fixed": "better", "broken": "worse", "wrong": "the same"}
ORDER: tuple[Outcome, ...] = ("broken", "fixed", "wrong", "right")


def answers(result: Result | None) -> str:
    """The section of cards, judged by the first metric of right and wrong, else by the first; "" without texts."""
    if not result or not result.samples:
        return ""
    metric, graded = _judge(result.samples)
    slots = list(result.samples[0].texts)
    before, after = slots[0], slots[-1]
    groups: dict[Outcome, list[Sample]] = {outcome: [] for outcome in ORDER}
    for sample in result.samples:
        groups[_graded(sample, metric, before, after) if graded else sample.outcome(metric, before, after)].append(
            sample
        )
    if graded:
        for samples in groups.values():
            samples.sort(key=lambda sample: -abs(_change(sample, metric, before, after)))
    shown = [(outcome, sample) for outcome in ORDER for sample in groups[outcome][:SAMPLES_EACH]]
    cards = "".join(_sample(outcome, sample, metric, graded) for outcome, sample in shown)
    left_out = len(result.samples) - len(shown)
    more = f" {len(shown)} of {len(result.samples):,} rows are shown, up to {SAMPLES_EACH} of a kind." * bool(left_out)
    return (
        f'<section><h2>Answers</h2><p class="small">Judged by {text(metric.replace("_", " "))}.{more}</p>'
        f'<div class="answers">{_filters(groups, before != after, graded)}'
        f'<div class="cards">{cards}</div></div></section>'
    )


def _judge(samples: Sequence[Sample]) -> tuple[str, bool]:
    """The metric that sorts the rows, and whether it grades them instead of calling them right or wrong."""
    names = list(samples[0].scores)
    for name in names:
        if all(value in (0.0, 1.0) for sample in samples for value in sample.scores[name].values()):
            return name, False
    return names[0], True


def _change(sample: Sample, metric: str, before: str, after: str) -> float:
    return sample.scores[metric][after] - sample.scores[metric][before]


def _graded(sample: Sample, metric: str, before: str, after: str) -> Outcome:
    change = _change(sample, metric, before, after)
    return "wrong" if change == 0 else "fixed" if change > 0 else "broken"


def _filters(groups: Mapping[Outcome, Sequence[Sample]], compared: bool, graded: bool) -> str:
    """Chips that show one kind of card, by radio buttons alone."""
    names: dict[Outcome, str] = {"right": "right", "wrong": "wrong"}
    if graded or compared:
        names = OUTCOMES if not graded else GRADED if compared else {}
    total = sum(map(len, groups.values()))
    chips = [("all", "all", total), *((kind, label, len(groups[kind])) for kind, label in names.items())]
    return "".join(
        f'<input type="radio" name="kind" id="kind-{kind}"{" checked" if kind == "all" else ""}>'
        f'<label for="kind-{kind}" class="chip {kind}">{label} <b>{count:,}</b></label>'
        for kind, label, count in chips
    )


def _sample(outcome: Outcome, sample: Sample, metric: str, graded: bool) -> str:
    wanted = sample.references[0] if sample.references else ""
    also = f" <small>or {len(sample.references) - 1} more</small>" if len(sample.references) > 1 else ""
    answers = []
    for slot, answer in sample.texts.items():
        right = sample.scores[metric][slot] == 1.0
        shown = _clipped(answer) if right else _marked(answer, wanted)
        sign = '<b class="yes" title="right">✓</b>' if right else '<b class="no" title="wrong">✗</b>'
        sign = f"<b>{sample.scores[metric][slot]:.2f}</b>" if graded else sign
        answers.append(f"<dt>{text(slot)} {sign}</dt><dd dir=auto>{shown or '<em>nothing</em>'}</dd>")
    return (
        f'<article class="card {outcome}"><p class="prompt" dir=auto>{_clipped(sample.prompt)}</p>'
        f"<dl><dt>wanted{also}</dt><dd dir=auto>{_clipped(wanted)}</dd>{''.join(answers)}</dl></article>"
    )


def _clipped(answer: str) -> str:
    left_out = len(answer) - LONGEST_TEXT
    return text(answer) if left_out <= 0 else f"{text(answer[:LONGEST_TEXT])}<small> … {left_out:,} more</small>"


def _marked(answer: str, wanted: str) -> str:
    """The text with the words that are not in `wanted` marked, where the two are alike enough for marks to help."""
    if len(answer) > LONGEST_TEXT or len(wanted) > LONGEST_TEXT:
        return _clipped(answer)
    words, wanted_words = re.findall(r"\w+|\W", answer), re.findall(r"\w+|\W", wanted)
    match = SequenceMatcher(None, wanted_words, words, autojunk=False)
    if match.ratio() < 0.6:
        return text(answer)
    parts = []
    for kind, _, _, start, end in match.get_opcodes():
        piece = text("".join(words[start:end]))
        parts.append(piece if kind == "equal" else f"<mark>{piece}</mark>" if piece else '<mark class="gap"></mark>')
    return "".join(parts)
