"""Preference pairs: one prompt, two answers, targets on the answers alone; TRL's forms give the same pair."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.config.values import split_dict
from veneer.data.chat import Template, conversation
from veneer.data.columns import with_columns
from veneer.data.encode import encode, family_of
from veneer.data.files import read_rows
from veneer.data.layouts import Message
from veneer.data.preference import chosen_alone, encode_pairs, read_pair
from veneer.errors import DataError

TEXT = st.text(st.sampled_from("abc 1é"), min_size=1, max_size=6).filter(str.strip)
ANSWERS = st.lists(TEXT, min_size=2, max_size=2, unique=True)


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def asked(*texts: str) -> list[Message]:
    """A user's and an assistant's turns by turns, the user's first and last."""
    return [message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


@given(texts=st.lists(TEXT, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1), answers=ANSWERS)
def test_every_form_of_a_row_is_the_same_pair(chatml, texts, answers):
    prompt, (chosen, rejected) = asked(*texts), ([message("assistant", answer)] for answer in answers)
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        {"messages": prompt, "chosen": chosen[0], "rejected": rejected[0]},
        {"chosen": prompt + chosen, "rejected": prompt + rejected},
        {"prompt": texts[-1], "chosen": prompt + chosen, "rejected": prompt + rejected},
    ]
    if len(texts) == 1:
        rows += [{"prompt": texts[0], "chosen": answers[0], "rejected": answers[1]}]
        rows += [{"question": texts[0], "chosen": answers[0], "rejected": answers[1]}]
        turns = [{"from": "human", "value": texts[0]}]
        sides = [{"from": "gpt", "value": answer} for answer in answers]
        rows += [{"conversations": turns, "chosen": sides[0], "rejected": sides[1]}]
    faults: list[str] = []
    pairs = [read_pair(row, faults) for row in rows]
    assert not faults and all(pair == pairs[0] for pair in pairs)
    found = encode_pairs(rows[:1], Template(chatml), 1000, "rows")
    for example, answer in zip(found.examples, answers, strict=True):  # as if it were the only completion
        alone = conversation({"prompt": prompt, "completion": answer}, "row")
        assert example == Template(chatml).encode(alone, 0, 1000)


def test_a_pair_moves_as_one_and_is_labelled(chatml):
    rows = [{"prompt": f"q{n // 2}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(4)]
    found = encode(rows, Template(chatml), 1000, "rows")
    assert len(found.pairs) == 4 and [one.row for one in found.examples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.groups()[0] == found.groups()[1] != found.groups()[2]
    assert found.pick([2]) == (found.pairs[2],)
    assert [found.label(i) for i in (0, 3)] == ["row 1, chosen", "row 2, rejected"]
    assert all(chosen.prompt == rejected.prompt for chosen, rejected in (pair.sequences for pair in found.pairs))


def test_answers_are_cut_and_counted(chatml):
    found = encode([{"prompt": "q", "chosen": "a", "rejected": "b" * 60}], Template(chatml), 40, "rows")
    assert (
        found.dropped_tokens and f"1 answers are cut at max_length 40: {found.dropped_tokens} tokens" in found.notes[1]
    )


Q, A, B = message("user", "q"), message("assistant", "a"), message("assistant", "b")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a", "rejected": "b"}, "has no `prompt`, and `chosen` and `rejected` are not whole conversations"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are equal: there is nothing to prefer"),
        ({"chosen": [Q, A], "rejected": [Q, A]}, "are equal"),
        ({"chosen": [Q, A], "rejected": [message("user", "r"), A]}, "part before the answer"),
        ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]}, "do not begin with the prompt given"),
        ({"prompt": "q", "chosen": [Q], "rejected": [Q, B]}, "`chosen` has no assistant's turn"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "`chosen` is a number"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "`rejected` is empty"),
        ({"prompt": "q", "chosen": "a"}, "`rejected` is null"),
        ({"prompt": "q" * 2000, "chosen": "a", "rejected": "b"}, "tokens come before the reply"),
    ],
)
def test_what_is_no_pair_is_named(chatml, row, said):
    with pytest.raises(DataError) as caught:
        encode_pairs([{"prompt": "q", "chosen": "a", "rejected": "b"}, row], Template(chatml), 200, "rows.jsonl")
    assert "rows.jsonl: 1 of 2 rows" in str(caught.value)
    assert "row 2: " in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"messages": [Q], "chosen": "a", "rejected": "b"},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"chosen": [Q, A], "rejected": [Q, B]},
    ],
)
def test_the_chosen_side_alone_is_trained_on_as_it_is_told(row):
    columns = split_dict(chosen_alone(row).removeprefix("--columns "))
    renamed = with_columns([row], columns, "rows")
    assert family_of(renamed) == "conversation"
    assert [m["content"] for m in conversation(renamed[0], "row").messages] == ["q", "a"]


def test_real_pairs(shared_data, chatml):
    rows = read_rows(shared_data / "preference" / "pairs.jsonl")[:40]
    found = encode(rows, Template(chatml), 20_000, "pairs")
    assert len(found.pairs) == len(rows)
    for row, pair in zip(rows, found.pairs, strict=True):
        chosen, rejected = pair.sequences
        for side, example in (("chosen", chosen), ("rejected", rejected)):
            answer = chatml.decode([i for i, on in zip(example.input_ids, example.targets, strict=True) if on])
            assert answer == f"{row[side]}<|im_end|>"
