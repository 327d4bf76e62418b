"""The demo's data: canonical calls, seeded, and nothing of the test split's phrasing in training."""

from __future__ import annotations

import json
import re
from string import Formatter

import pytest

from veneer.data import toolcalls
from veneer.data.chat import Template, encode_rows
from veneer.data.files import read_rows
from veneer.data.toolcalls import FUNCTIONS, OPENING, VALUES, call, rows, write
from veneer.errors import DataError

BY_NAME = {function.name: function for function in FUNCTIONS}
HELD_OUT_VALUES = ("amount", "degrees", "cuisine", "city", "person", "message", "song", "artist", "event")


def test_a_call_is_compact_json_in_the_order_of_the_signature():
    assert call("convert_currency", {"amount": 5, "from": "USD", "to": "EUR"}) == (
        '{"name":"convert_currency","arguments":{"amount":5,"from":"USD","to":"EUR"}}'
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_row_is_a_request_with_its_canonical_call(split):
    for row in rows(split, 900, seed=3):
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"].startswith(OPENING)
        assert not re.search(r"[{}]", row["prompt"])
        answer = json.loads(row["completion"])
        function = BY_NAME[answer["name"]]
        assert list(answer["arguments"]) == list(function.arguments)
        assert row["completion"] == call(answer["name"], answer["arguments"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_argument_is_said_in_the_request(split):
    for row in rows(split, 900, seed=4):
        answer = json.loads(row["completion"])
        for name, meant in answer["arguments"].items():
            said = [said for said, value in VALUES[BY_NAME[answer["name"]].arguments[name]][split] if value == meant]
            assert any(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", row["prompt"]) for text in said), row


def test_converted_currencies_differ():
    answers = [json.loads(row["completion"]) for row in rows("train", 900, seed=5)]
    converted = [answer["arguments"] for answer in answers if answer["name"] == "convert_currency"]
    assert converted
    assert all(arguments["from"] != arguments["to"] for arguments in converted)


@pytest.mark.parametrize(
    ("said", "meant"), [("7 am", "7:00 am"), ("9:40 pm", "9:40 pm"), ("11 pm", "11:00 pm"), ("1:05 am", "1:05 am")]
)
def test_times_always_have_their_minutes(said, meant):
    assert dict(VALUES["time"]["train"] + VALUES["time"]["test"])[said] == meant


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_templates_are_many_and_use_each_argument_once(function):
    assert len(function.train) >= 10
    assert len(function.test) >= 3
    for template in function.train + function.test:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        assert sorted(fields) == sorted(function.arguments), template


def test_test_phrasings_are_held_out():
    train = {_bare(template) for function in FUNCTIONS for template in function.train}
    test = {_bare(template) for function in FUNCTIONS for template in function.test}
    assert len(train) == sum(len(function.train) for function in FUNCTIONS)
    assert not train & test


def _bare(template: str) -> str:
    """Words alone: neither capitals, punctuation nor a plural make another phrasing."""
    return re.sub(r"[^a-z{} ]", "", template.lower()).replace("lights", "light")


def test_test_values_are_held_out():
    for kind in HELD_OUT_VALUES:
        train, test = ({said for said, _ in VALUES[kind][split]} for split in ("train", "test"))
        assert train and test and not train & test, kind


def test_no_test_prompt_is_in_train():
    train = {row["prompt"] for seed in range(3) for row in rows("train", 2000, seed)}
    assert not train & {row["prompt"] for row in rows("test", 1000, 0)}


def test_rows_are_seeded_distinct_and_balanced():
    found = rows("train", 450, seed=1)
    assert found == rows("train", 450, seed=1)
    assert found[:100] == rows("train", 100, seed=1)  # more rows, the same beginning
    assert found != rows("train", 450, seed=2)
    assert len({row["prompt"] for row in found}) == 450
    counts = [sum(json.loads(row["completion"])["name"] == name for row in found) for name in BY_NAME]
    assert max(counts) - min(counts) <= 0.2 * max(counts)


def test_impossible_wishes_are_refused(monkeypatch):
    with pytest.raises(DataError, match="'validation', wanted 'train' or 'test'"):
        rows("validation", 1, 0)
    monkeypatch.setattr(toolcalls, "FUNCTIONS", (BY_NAME["set_light"],))  # 4 templates, 8 rooms, on and off
    assert len(rows("test", 64, 0)) == 64
    with pytest.raises(DataError, match="65 test rows are wanted, the templates make about 64 different ones"):
        rows("test", 65, 0)


def test_write_makes_files_that_are_read_back(tmp_path):
    files = write(tmp_path / "new" / "folder", n_train=50, n_test=20, seed=7)
    assert read_rows(files["train"]) == rows("train", 50, 7)
    assert read_rows(files["test"]) == rows("test", 20, 7)
    again = write(tmp_path / "again", n_train=50, n_test=20, seed=7)
    assert files["train"].read_bytes() == again["train"].read_bytes()


def test_rows_are_short(smollm2_tokenizer):
    encoded = encode_rows(rows("train", 180, 0) + rows("test", 90, 0), Template(smollm2_tokenizer), 1000, "toolcalls")
    lengths = [len(example.input_ids) for example in encoded.examples]
    assert sum(lengths) / len(lengths) < 90
    assert max(lengths) <= 110
    assert encoded.notes == ()
