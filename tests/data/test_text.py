"""Text: every token of every document is predicted once, nothing is padded, and a split moves whole documents."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.batches import split
from veneer.data.chat import Template
from veneer.data.encode import encode, family_of
from veneer.data.files import read_rows
from veneer.data.text import Document, chunks, encode_text
from veneer.errors import DataError

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6).filter(
    lambda documents: sum(map(len, documents)) > 1
)


@given(documents=DOCUMENTS, max_length=st.integers(2, 9))
def test_every_token_but_the_first_is_predicted_once_after_the_one_before_it(documents, max_length):
    found = chunks([Document(tuple(ids), row) for row, ids in enumerate(documents)], max_length)
    whole = [token for ids in documents for token in ids]
    pairs = [pair for one in found for pair in pairwise(one.input_ids)]
    assert pairs == list(pairwise(whole))
    assert all(one.targets == (False, *[True] * (len(one.input_ids) - 1)) for one in found)
    assert all(len(one.input_ids) == max_length for one in found[:-1]) and 2 <= len(found[-1].input_ids) <= max_length
    rows = [row for row, ids in enumerate(documents) for _ in ids]
    assert [one.row for one in found] == [rows[1 + k * (max_length - 1)] for k in range(len(found))]


@pytest.mark.parametrize("starts", [False, True])
def test_the_end_token_stands_after_each_document_and_the_start_token_where_the_tokenizer_puts_it(tokenizer, starts):
    one = tokenizer("none", starts=starts)
    found = encode_text([{"text": "ab"}, {"text": "cd"}], Template(one), 100, "rows")
    start = "<s>" if starts else ""
    assert [one.decode(example.input_ids) for example in found.examples] == [f"{start}ab<|im_end|>{start}cd<|im_end|>"]


def test_it_is_said_how_many_documents_became_how_many_chunks(chatml):
    rows = [{"text": "ab" * n, "title": "x", "id": 3} for n in (0, 3, 9)]
    found = encode_text(rows, Template(chatml, "be brief"), 5, "rows")
    assert f"2 documents, <|im_end|> after each, became {len(found.examples)} chunks of up to 5" in found.notes[0]
    assert found.notes[1:] == (
        "of these columns nothing is read: id, title",
        "1 empty texts are left out",
        "the system prompt stands before no text: there is no conversation",
    )
    assert found.label(1) == "chunk 2"


@given(texts=st.lists(st.sampled_from(["ab", "cd", "ef", "gh"]), min_size=2, max_size=30), seed=st.integers(0, 9))
def test_a_split_moves_whole_documents_and_equal_ones_together(chatml, texts, seed):
    found = encode_text([{"text": text} for text in texts], Template(chatml), 3, "rows")
    groups = found.groups()
    try:
        train, held = split(len(groups), 0.3, seed, groups)
    except DataError:
        return  # all of it would be kept back
    assert not {texts[unit] for unit in train} & {texts[unit] for unit in held}
    joined = [token for unit in held for token in groups[unit]]
    pieces = [example.input_ids for example in found.pick(held)]
    assert [*pieces[0][:1], *(token for piece in pieces for token in piece[1:])] == joined


@pytest.mark.parametrize(
    ("row", "family"),
    [
        ({"text": "a"}, "text"),
        ({"text": "a", "url": "b", "timestamp": 3}, "text"),
        ({"text": "a", "messages": []}, "conversation"),
        ({"text": "a", "question": "b", "answer": "c"}, "conversation"),
        ({"text": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "completion": "b"}, "conversation"),
    ],
)
def test_what_counts_as_text(row, family):
    assert family_of([row, row]) == family


def test_rows_of_text_among_others_are_faults(chatml):
    with pytest.raises(DataError, match="row 1: has the fields 'text'"):
        encode([{"text": "a"}, {"prompt": "a", "completion": "b"}], Template(chatml), 100, "rows")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "label": 1}], "row 1: has `text` and `label`: to train on the answers give --columns prompt="),
        ([{"text": "a"}, {"text": 3}], "row 2: `text` is a number, wanted text"),
        ([{"text": "a\ud800"}], "row 1: `text` is not valid Unicode"),
        ([{"text": " "}], "all of its 1 texts are empty"),
    ],
)
def test_what_cannot_be_trained_on_is_named(chatml, rows, said):
    with pytest.raises(DataError) as caught:
        encode(rows, Template(chatml), 100, "rows.jsonl")
    assert said in str(caught.value) and "rows.jsonl" in str(caught.value)


def test_a_chunk_has_two_tokens_and_a_text_an_end(chatml, tokenizer):
    with pytest.raises(DataError, match="max_length is 1: a chunk of text is at least 2 tokens"):
        encode([{"text": "a"}], Template(chatml), 1, "rows")
    with pytest.raises(DataError, match="no end token"):
        encode([{"text": "a"}], Template(tokenizer("chatml", eos_token=None)), 10, "rows")


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    assert read_rows(tmp_path / "book.txt") == [{"text": "one\n\ntwo\n"}]


@pytest.mark.parametrize("name", ["text/state_union.jsonl", "text/c4.jsonl"])
def test_real_texts(shared_data, chatml, name):
    rows = read_rows(shared_data / name)[:20]
    found = encode(rows, Template(chatml), 512, name)
    assert len(found.documents) == len(rows)
    assert sum(sum(example.targets) for example in found.examples) == sum(map(len, found.groups())) - 1
