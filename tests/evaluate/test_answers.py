"""Cards of answers: which are shown, how they are counted, and what is marked in them."""

from __future__ import annotations

import re
from dataclasses import replace

from veneer.evaluate.answers import LONGEST_TEXT, SAMPLES_EACH, _marked, answers
from veneer.evaluate.run import Sample


def cards(html):
    return re.findall(r'<article class="card (\w+)">', html)


def test_every_kind_is_shown_broken_first_and_counts_are_of_all_rows(result):
    html = answers(result)
    expected = ["broken"] * 2 + ["fixed"] * SAMPLES_EACH + ["wrong"] * SAMPLES_EACH + ["right"] * SAMPLES_EACH
    assert cards(html) == expected
    chips = re.findall(r"class=\"chip (\w+)\">([^<]*) <b>(\d+)</b>", html)
    assert chips == [
        ("all", "all", "32"),
        ("fixed", "fixed", "10"),
        ("broken", "broken", "2"),
        ("wrong", "still wrong", "10"),
        ("right", "right before and after", "10"),
    ]
    assert f"{len(expected)} of 32 rows are shown" in html


def test_each_answer_is_signed_right_or_wrong(result):
    card = answers(result).split("<article")[1]
    assert re.search(r"base <b class=\"yes\"[^>]*>✓</b></dt><dd dir=auto>four</dd>", card)
    assert re.search(r"adapter <b class=\"no\"[^>]*>✗</b></dt><dd dir=auto>x</dd>", card)


def test_one_slot_has_no_before_and_after(result):
    alone = [
        Sample(
            s.prompt,
            s.references,
            {"base": s.texts["base"]},
            {"exact_match": {"base": s.scores["exact_match"]["base"]}},
        )
        for s in result.samples
    ]
    html = answers(replace(result, samples=tuple(alone)))
    assert set(cards(html)) == {"right", "wrong"}
    assert re.findall(r"chip (\w+)", html) == ["all", "right", "wrong"]


def test_nothing_without_text(result):
    assert answers(None) == ""
    assert answers(replace(result, samples=())) == ""


def test_all_shown_is_not_said(result):
    assert "rows are shown" not in answers(replace(result, samples=result.samples[:3]))


def test_text_is_escaped_silence_said_and_length_cut(result):
    hostile = "<script>alert(1)</script>\x1b[31m"
    sample = Sample(hostile, ("a", "b"), {hostile: "", "after": "long " * 1000}, {"m": {hostile: 0.0, "after": 0.0}})
    html = answers(replace(result, samples=(sample,)))
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;\u241b[31m" in html
    assert "<em>nothing</em>" in html
    assert f"… {5000 - LONGEST_TEXT:,} more" in html
    assert "or 1 more" in html


def test_words_that_differ_are_marked():
    wanted = '{"name": "set_alarm", "at": "7:30"}'
    assert _marked('{"name": "set_timer", "at": "7:30"}', wanted).count("<mark>") == 1
    assert "<mark>set_timer</mark>" in _marked('{"name": "set_timer", "at": "7:30"}', wanted)
    assert _marked(wanted[:-1], wanted).endswith('<mark class="gap"></mark>')
    assert "<mark" not in _marked("I am sorry, I cannot do that.", wanted)
    assert "<mark>&lt;b&gt;</mark>" in _marked("one two three <b>", "one two three ")


def test_grades_sort_into_better_and_worse_largest_change_first(result):
    changes = [0.1, -0.2, 0.5, 0.0]
    graded = [
        Sample(f"row {n}", ("four",), s.texts, {"rouge_l": {"base": 0.3, "adapter": 0.3 + change}})
        for n, (s, change) in enumerate(zip(result.samples, changes, strict=False))
    ]
    html = answers(replace(result, samples=tuple(graded)))
    assert cards(html) == ["broken", "fixed", "fixed", "wrong"]
    assert html.index("row 2") < html.index("row 0")
    assert re.findall(r"class=\"chip (\w+)\">([^<]*) <b>(\d+)</b>", html) == [
        ("all", "all", "4"),
        ("fixed", "better", "2"),
        ("broken", "worse", "1"),
        ("wrong", "the same", "1"),
    ]
    assert "<b>0.80</b>" in html and "✓" not in html


def test_a_metric_of_right_and_wrong_judges_before_one_that_grades(result):
    both = [replace(s, scores={"rouge_l": dict.fromkeys(s.texts, 0.4), **s.scores}) for s in result.samples]
    html = answers(replace(result, samples=tuple(both)))
    assert "Judged by exact match." in html and "✓" in html
