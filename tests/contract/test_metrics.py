"""The law of METRICS: right answers score 1, wrong ones 0, whatever the text; an unknown name is told the nearest."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.evaluate.metrics import CHOICE, LIKELIHOOD, METRICS, check_names, metric

# Two alphabets with no letter in common: no metric may see a resemblance.
wanted = st.text("abcdefgABCäλ漢 0123", min_size=1).filter(str.strip)
unrelated = st.text("uvwxyzUVωя 789", min_size=1).filter(str.strip)
# What a metric can see of a text, where not all: ROUGE a to z and digits; ROUGE-2 pairs of words, BLEU runs of four.
words = st.text("abcdefgABC0123", min_size=1)
VISIBLE = {
    "rouge1": wanted.filter(re.compile("[A-Za-z0-9]").search),
    "bleu": st.lists(words, min_size=4, max_size=6).map(" ".join),
    "rouge2": st.lists(words, min_size=2, max_size=5).map(" ".join),
    "rouge_l": wanted.filter(re.compile("[A-Za-z0-9]").search),
}


def rows_for(name):
    """Lists of references that the metric can see."""
    return st.lists(st.lists(VISIBLE.get(name, wanted), min_size=1, max_size=3), min_size=1, max_size=5)


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=30)
@given(data=st.data())
def test_right_answers_score_one(name, data):
    rows = data.draw(rows_for(name))
    answers = [data.draw(st.sampled_from(references)) for references in rows]
    assert metric(name)(answers, rows) == [1.0] * len(rows)
    assert total(name, answers, rows) == 1.0


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=30)
@given(data=st.data())
def test_wrong_answers_score_zero(name, data):
    rows = data.draw(rows_for(name))
    answers = [data.draw(unrelated) for _ in rows]
    assert metric(name)(answers, rows) == [0.0] * len(rows)
    assert total(name, answers, rows) == 0.0


def total(name, answers, rows):
    """What all rows score together."""
    found = metric(name)
    return found.summary.total(np.sum(found.statistics(answers, rows, found(answers, rows)), axis=0))


@pytest.mark.parametrize("name", METRICS)
def test_silence_is_a_wrong_answer(name):
    assert metric(name)([""], [["oh yes it is"]]) == [0.0]


@pytest.mark.parametrize("name", METRICS)
def test_rows_keep_their_places(name):
    right, wrong, also = "oh yes it is", "mad pug lamb bun", "qv zrk wfc jcq"
    assert metric(name)([right, wrong, right], [[right], [also], [wrong, right]]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", METRICS)
def test_one_prediction_for_each_row(name):
    with pytest.raises(ValueError):
        metric(name)(["yes"], [["yes"], ["no"]])


def test_a_metric_named_twice_is_refused():
    with pytest.raises(ConfigError, match="loss is named twice"):
        check_names(["loss", "bleu", "loss"])


@pytest.mark.parametrize("name", [*METRICS, *LIKELIHOOD, *CHOICE])
def test_misspelt_name_is_told_the_nearest(name):
    with pytest.raises(ConfigError, match=f"did you mean {name}"):
        check_names([name + "x"])


def test_all_unknown_names_in_one_message():
    with pytest.raises(ConfigError, match=r"'exct_match', did you mean exact_match.*'zzz'.*Known metrics: exact_match"):
        check_names(["exct_match", "loss", "zzz"])


def test_likelihood_is_no_text_metric():
    with pytest.raises(ConfigError, match="likelihoods"):
        metric("loss")
