"""The law of METRICS: right answers score 1, wrong ones 0, whatever the text; an unknown name is told the nearest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.evaluate.metrics import LIKELIHOOD, METRICS, check_names, metric

# Two alphabets with no letter in common: no metric may see a resemblance.
wanted = st.text("abcdefgABCäλ漢 0123", min_size=1).filter(str.strip)
unrelated = st.text("uvwxyzUVωя 789", min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", METRICS)
@given(rows=st.lists(st.lists(wanted, min_size=1, max_size=3), min_size=1, max_size=5), data=st.data())
def test_right_answers_score_one(name, rows, data):
    answers = [data.draw(st.sampled_from(references)) for references in rows]
    assert metric(name)(answers, rows) == [1.0] * len(rows)


@pytest.mark.parametrize("name", METRICS)
@given(rows=st.lists(st.tuples(unrelated, st.lists(wanted, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_wrong_answers_score_zero(name, rows):
    answers, references = zip(*rows, strict=True)
    assert metric(name)(answers, references) == [0.0] * len(rows)


@pytest.mark.parametrize("name", METRICS)
def test_silence_is_a_wrong_answer(name):
    assert metric(name)([""], [["yes"]]) == [0.0]


@pytest.mark.parametrize("name", METRICS)
def test_rows_keep_their_places(name):
    assert metric(name)(["yes", "no", "yes"], [["yes"], ["yes"], ["no", "yes"]]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", METRICS)
def test_one_prediction_for_each_row(name):
    with pytest.raises(ValueError):
        metric(name)(["yes"], [["yes"], ["no"]])


@pytest.mark.parametrize("name", [*METRICS, *LIKELIHOOD])
def test_misspelt_name_is_told_the_nearest(name):
    with pytest.raises(ConfigError, match=f"did you mean {name}"):
        check_names([name + "x"])


def test_all_unknown_names_in_one_message():
    with pytest.raises(ConfigError, match=r"'exct_match', did you mean exact_match.*'zzz'.*Known metrics: exact_match"):
        check_names(["exct_match", "loss", "zzz"])


def test_likelihood_is_no_text_metric():
    with pytest.raises(ConfigError, match="likelihoods"):
        metric("loss")
