"""Corpus metrics and ROUGE against the libraries' own public calls, and what they refuse."""

from __future__ import annotations

from itertools import zip_longest

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf, sentence_bleu, sentence_chrf

from veneer.errors import DataError
from veneer.evaluate.metrics import metric

REFERENCES = [
    ["The Eagle is a cheap coffee shop near Burger King.", "Near Burger King there is a cheap coffee shop, The Eagle."],
    ["It rained all day long in the north of the country."],
    ["She sold the old red car.", "The old red car was sold by her.", "She has sold that car."],
    ["Yes."],
]
ANSWERS = [
    "The Eagle is a coffee shop near the Burger King.",
    "",
    "She sold the red car by herself, it was old.",
    "Yes.",
]
OTHERS = ["An eagle.", "It rained in the north of the country.", "The old red car.", "No."]
COLUMNS = [list(column) for column in zip_longest(*REFERENCES)]


def scored(name, answers, references=REFERENCES):
    found = metric(name)
    return found.statistics(answers, references, found(answers, references)), found


@pytest.mark.parametrize("name, corpus", [("bleu", corpus_bleu), ("chrf", corpus_chrf)])
@pytest.mark.parametrize("answers", [ANSWERS, OTHERS])
def test_corpus_score_is_sacrebleus(name, corpus, answers):
    statistics, found = scored(name, answers)
    assert found.summary.score(statistics).score == pytest.approx(corpus(answers, COLUMNS).score / 100)


def test_rows_are_sacrebleus_sentences():
    pairs = list(zip(ANSWERS, REFERENCES, strict=True))
    # Its own sentence_bleu takes short sentences for what they are.
    assert metric("bleu")(ANSWERS, REFERENCES) == pytest.approx([min(1, sentence_bleu(*p).score / 100) for p in pairs])
    assert metric("chrf")(ANSWERS, REFERENCES) == pytest.approx([sentence_chrf(*p).score / 100 for p in pairs])


def test_interval_and_difference_are_those_of_the_corpus_not_of_rows():
    many, rows = [answer for answer in ANSWERS for _ in range(5)], [row for row in REFERENCES for _ in range(5)]
    statistics, found = scored("bleu", many, rows)
    got = found.summary.score(statistics)
    assert got.low < got.score < got.high
    assert got.score != pytest.approx(sum(found(many, rows)) / len(rows), abs=0.01)
    others, _ = scored("bleu", [answer for answer in OTHERS for _ in range(5)], rows)
    change = found.summary.difference(others, statistics)
    assert change.score == pytest.approx(found.summary.score(others).score - got.score)
    same = found.summary.difference(statistics, statistics)
    assert same.score == 0 and same.low < 0 < same.high


@pytest.mark.parametrize("name, kind", [("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge_is_the_best_reference_by_rouge_score(name, kind):
    scorer = RougeScorer([kind])
    best = [
        max(scorer.score(reference, answer)[kind].fmeasure for reference in row)
        for answer, row in zip(ANSWERS, REFERENCES, strict=True)
    ]
    assert metric(name)(ANSWERS, REFERENCES) == pytest.approx(best)
    assert 0 < best[2] < 1


def test_rouge_refuses_what_it_cannot_see():
    with pytest.raises(DataError, match=r"2 of 3 references(.|\n)*row 1: '漢字'(.|\n)*row 3: 'ω'(.|\n)*chrf"):
        metric("rouge_l")(["漢字", "a", "ω"], [["漢字"], ["a"], ["ω"]])


def test_bleu_refuses_labels():
    with pytest.raises(DataError, match="no reference has as many"):
        metric("bleu")(["yes", "no"], [["yes"], ["no", "not at all"]])
