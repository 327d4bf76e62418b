"""BLEU (Papineni et al., 2002) and chrF (Popović, 2015) as sacrebleu computes them (Post, 2018), over 100.

Both count n-grams that prediction and references share. The score is that of the counts summed over all rows, with any
number of references a row; a row alone is scored as a sentence (BLEU: of the orders that it is long enough for). A
corpus without four words in a row has a BLEU of 0, however right it is: references that are all shorter are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from veneer.errors import DataError
from veneer.evaluate.intervals import Statistics, Summary
from veneer.evaluate.metrics import TextMetric

Texts = Sequence[str]
References = Sequence[Sequence[str]]


def _counts(corpus: Any, predictions: Texts, references: References) -> Statistics:
    """Of each row, what sacrebleu adds up."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions beside {len(references)} rows of references")
    if isinstance(corpus, BLEU) and not any(
        _words(text) >= corpus.max_ngram_order for row in references for text in row
    ):
        raise DataError(
            f"BLEU counts runs of {corpus.max_ngram_order} words, and no reference has as many: right answers would "
            "score 0. Wanted: --metrics chrf, accuracy or exact_match."
        )
    # sacrebleu wants its references as columns: the first of every row, the second of every row (None: no more).
    columns = [list(column) for column in zip_longest(*references)]
    # Underscored, and yet what sacrebleu's own significance tests are built on.
    return corpus._extract_corpus_statistics(list(predictions), columns)


def _words(text: str) -> int:
    return len(_BLEU.tokenizer(text).split())


def _score(metric: Any, counts: Sequence[float]) -> float:
    # exp(log(100)) is a little off 100.
    return min(1.0, round(metric._compute_score_from_stats(list(counts)).score / 100, 12))


def _corpus_metric(corpus: Any, sentence: Any) -> TextMetric:
    """From sacrebleu's metric for corpora and the one for single sentences, which count alike."""
    return TextMetric(
        rows=lambda texts, references: [_score(sentence, counts) for counts in _counts(corpus, texts, references)],
        summary=Summary(lambda sums: _score(corpus, sums), (0.0, 1.0)),
        of_rows=lambda texts, references: _counts(corpus, texts, references),
    )


_BLEU = BLEU(force=True)  # which only silences a guess about texts that look tokenised
bleu = _corpus_metric(_BLEU, BLEU(force=True, effective_order=True))
chrf = _corpus_metric(CHRF(), CHRF())
