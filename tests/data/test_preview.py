"""The preview shows every token once, marks the trained ones, and counts what the mask says."""

from __future__ import annotations

import io
import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from veneer.data.chat import EncodedRows, Example, Template, encode_rows
from veneer.data.preview import preview, runs, summary

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "[red]x[/red]", "completion": "two\nlines"}]


def shown(encoded, tokenizer, n=5, **options):
    console = Console(file=io.StringIO(), width=300, **options)
    console.print(preview(encoded, tokenizer, n))
    return console.file.getvalue()


def test_trained_text_stands_between_brackets(chatml):
    text = shown(encode_rows(ROWS, Template(chatml), 1000, "rows.jsonl"), chatml)
    assert "⟦b<|im_end|>⟧" in text
    assert "[red]x[/red]<|im_end|>↵" in text  # data is no markup
    assert "⟦two↵\nlines<|im_end|>⟧" in text


def test_trained_text_is_coloured(chatml):
    text = shown(encode_rows(ROWS, Template(chatml), 1000, "rows.jsonl"), chatml, force_terminal=True)
    assert "\x1b[1;32m⟦b<|im_end|>⟧" in text


def test_only_n_rows_are_shown_but_all_are_counted(chatml):
    text = shown(encode_rows(ROWS, Template(chatml), 1000, "rows.jsonl"), chatml, n=1)
    assert "row 1:" in text
    assert "row 2:" not in text
    assert "rows" in text and "2" in text.split("rows")[-1]


def test_data_cannot_steer_the_terminal(chatml):
    encoded = encode_rows([{"prompt": "\x1b[2J\x07\x9b", "completion": "b\x7f"}], Template(chatml), 1000, "rows.jsonl")
    text = shown(encoded, chatml)
    assert not any(control in text for control in "\x1b\x07\x9b\x7f")
    assert "␛[2J␇" in text


def test_notes_are_shown(chatml):
    encoded = encode_rows([{"prompt": "a", "completion": "b" * 50}], Template(chatml), 40, "rows.jsonl")
    assert "note: 1 row is cut at max_length 40" in shown(encoded, chatml)
    assert f", {encoded.dropped_tokens} cut off" in shown(encoded, chatml)


@given(text=st.text(max_size=30), flips=st.lists(st.booleans(), min_size=1, max_size=40))
def test_runs_join_to_the_whole_text(chatml, text, flips):
    ids = chatml(text or "a")["input_ids"]
    targets = tuple(flips[i % len(flips)] for i in range(len(ids)))
    found = list(runs(Example(tuple(ids), targets, 0, 0), chatml))
    # a run may end inside a character, which then decodes to a stand-in until the rest is there
    assert sum(len(run) for run, _ in found) == len(chatml.decode(ids))
    assert all(first[1] != second[1] for first, second in pairwise(found))


def test_summary_by_hand():
    examples = (
        Example((1, 2, 3), (False, True, True), 0, 0),
        Example((1, 2, 3, 4, 5), (False, False, False, False, True), 2, 7),
    )
    found = summary(EncodedRows(examples, 7, (1,), ("a note",)))
    assert json.loads(json.dumps(found)) == {
        "rows": 2,
        "tokens": 8,
        "trained_tokens": 3,
        "truncated_rows": 1,
        "dropped_tokens": 7,
        "rows_without_targets": 1,
        "length": {"p0": 3, "p50": 5, "p95": 5, "p100": 5},
        "trained_length": {"p0": 1, "p50": 2, "p95": 2, "p100": 2},
        "notes": ["a note"],
    }
