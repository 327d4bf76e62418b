"""Multiple choice in a row: how the right one is named, and what is refused rather than guessed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.choices import read_choices
from veneer.data.layouts import conversation, renamed
from veneer.errors import DataError


def row(answer, choices=("red", "green", "blue"), **more):
    return {"question": "Which?", "choices": list(choices), "answer": answer, **more}


@pytest.mark.parametrize("answer", [2, "C", "c", " C ", "blue"])
def test_the_right_one_by_place_letter_or_text(answer):
    faults: list[str] = []
    found = read_choices(row(answer), faults)
    assert found is not None and (found.answer, found.right, faults) == (2, "blue", [])


@given(st.lists(st.text(min_size=2).filter(str.strip), min_size=2, max_size=6, unique_by=str.strip), st.data())
def test_every_place_is_found_again(choices, data):
    place = data.draw(st.integers(0, len(choices) - 1))
    for answer in (place, "ABCDEF"[place]):
        found = read_choices(row(answer, choices), [])
        assert found is not None and found.right == choices[place]


def test_arc_as_hugging_face_has_it():
    arc = {"question": "Which?", "choices": {"text": ["red", "green"], "label": ["1", "2"]}, "answerKey": "2"}
    found = read_choices(arc, [])
    assert found is not None and found.right == "green"
    assert conversation(arc, "row 1").messages[-1]["content"] == "green"


@pytest.mark.parametrize(
    "bad, words",
    [
        (row(3), "is 3, which is none of the choices; wanted a number from 0 to 2"),
        (row(-1), "none of the choices"),
        (row(True), "none of the choices"),
        (row("D"), "none of the choices"),
        (row("1"), "none of the choices"),  # from 0 or from 1? Data sets have both
        (row("A", ["B", "A"]), "could be each of 'B', 'A'"),
        (row(0, ["red"]), "wanted a list of at least two texts"),
        (row(0, ["red", ""]), "wanted a list of at least two texts"),
        ({"question": "Which?", "choices": ["a", "b"]}, "has `choices` and no `answer`"),
    ],
)
def test_what_could_be_wrong_is_refused(bad, words):
    faults: list[str] = []
    assert read_choices(bad, faults) is None
    assert words in faults[0]
    with pytest.raises(DataError, match="choice"):
        conversation(bad, "row 1")


def test_equal_texts_are_one():
    found = read_choices(row(2, ["red", "green", "red"]), [])
    assert found is not None and found.answer == 0


def test_the_right_one_is_the_reply_and_a_passage_stands_before_the_question():
    found = conversation(row("B", context="A passage."), "row 1")
    assert [message["content"] for message in found.messages] == ["A passage.\n\nWhich?", "green"]
    assert found.references == ("green",)
    assert "`choices`" in str(renamed(row("B"))[1])


def test_a_row_with_a_completion_keeps_it():
    kept = {"prompt": "a", "completion": "b", "choices": "unrelated"}
    assert conversation(kept, "row 1").messages[-1]["content"] == "b"
