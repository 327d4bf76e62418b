"""ROUGE (Lin, 2004) as rouge-score computes it: F-measure of n-grams or of the longest common subsequence, no stemming.

The best reference of a row counts. Its standard words are runs of a-z and 0-9 in lower case, so that texts in other
scripts would score 0 whatever they say: such references are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from rouge_score.rouge_scorer import RougeScorer

from veneer.data.files import shortened
from veneer.errors import DataError, listed


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    pairs = list(zip(predictions, references, strict=True))
    blind = [
        f"row {number}: {wanted[0]!r}" if wanted else f"row {number}: no reference"
        for number, (_, wanted) in enumerate(pairs, start=1)
        if not any(re.search("[a-z0-9]", reference.lower()) for reference in wanted)
    ]
    if blind:
        raise DataError(
            listed(
                f"ROUGE sees letters a to z and digits only; {len(blind):,} of {len(pairs):,} references have none:",
                shortened(blind),
                "Leave rouge out of --metrics; chrf works for every script.",
            )
        )
    scorer = RougeScorer([kind])
    return [float(scorer.score_multi(wanted, text)[kind].fmeasure) for text, wanted in pairs]


rouge1 = partial(_rouge, "rouge1")
rouge2 = partial(_rouge, "rouge2")
rouge_l = partial(_rouge, "rougeL")
