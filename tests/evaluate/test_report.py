"""The report page: all of it inside one file, all text escaped, the same bytes each time, and true to its values."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.evaluate.intervals import Score
from veneer.evaluate.page import text
from veneer.evaluate.report import _value, _verdict, write_report

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Balanced(HTMLParser):
    """Every tag that opens closes in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


CARD = {
    "method": "lora",
    "settings": {"r": 16, "use_rslora": False, "scale": None},
    "scales": {f"layers.{n}.up": 2.0 for n in range(40)},
    "ranks": {f"layers.{n}.up": 8 + n % 2 for n in range(40)},
    "base_name": "tiny",
    "training": {"trainable_parameters": 4_884_480, "train_seconds": 187.4, "tokens_per_second": 1214.2},
    "parents": [],
}
SETTINGS = {"learning_rate": 2e-3, "seed": 12345, "max_steps": None}


@pytest.fixture
def page(tmp_path, history, result, norms):
    def written(**changes):
        values = {
            "title": "A title",
            "card": CARD,
            "settings": SETTINGS,
            "history": history,
            "result": result,
            "norms": norms,
            "notes": ["mind this"],
        }
        write_report(tmp_path / "report.html", **{**values, **changes})
        return (tmp_path / "report.html").read_text("utf-8")

    return written


def parsed(html):
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser.seen


def test_one_balanced_file_that_loads_and_runs_nothing(page):
    tags = parsed(page())
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not any({"src", "onclick", "onload"} & attributes.keys() for _, attributes in tags)
    assert all(a.get("xlink:href", "#").startswith("#") and "href" not in a for _, a in tags)
    assert "default-src 'none'" in page()
    assert "@import" not in page() and not re.search(r"url\((?!#)", page())


def test_same_values_same_bytes(page):
    assert page() == page()


def test_ids_are_unique_but_for_what_svgs_share(page):
    ids = [attributes["id"] for _, attributes in parsed(page()) if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_headline_table_and_facts(page):
    html = page()
    assert "<strong>62.5 %</strong><em>base 37.5 %</em>" in html
    assert "<td>37.5 %<small>22.0 to 53.0</small></td>" in html
    assert '<td class="better">+25.0 pts<small>+5.0 to +45.0</small></td>' in html
    assert "<td>0.0310<small>no interval</small></td>" in html
    assert '<td class="better">\N{MINUS SIGN}2.07' in html
    assert "<dd>4.88 M</dd>" in html and "<dd>3 min 7 s</dd>" in html and "<dd>1,214</dd>" in html
    assert "left:22.00%;width:31.00%" in html


def test_the_loss_of_rows_it_never_saw_comes_before_that_of_rows_it_saw(page):
    training = {**CARD["training"], "eval_loss_before": 3.587, "best_eval_loss": 0.1694}
    html = page(result=None, card={**CARD, "training": training})
    assert "<span>validation loss</span><strong>0.169</strong><em>before 3.59</em>" in html
    assert html.index("<span>validation loss") < html.index("<span>training loss")
    unvalidated = page(result=None, card={**CARD, "training": {**training, "best_eval_loss": None}})
    assert "<span>validation loss" not in unvalidated and "<span>training loss" in unvalidated


def test_notes_come_first_and_once(page):
    html = page(notes=["mind this", "a note"])
    assert html.index("mind this") < html.index("Exact match".lower())
    assert html.count("<li>a note</li>") == 1


def test_settings_and_card_are_readable(page):
    html = page()
    assert "<tr><th>learning_rate</th><td>0.002</td></tr>" in html
    assert "<tr><th>seed</th><td>12345</td></tr>" in html
    assert "<tr><th>settings.use_rslora</th><td>no</td></tr>" in html
    assert "<tr><th>scales</th><td>2 <small>on all 40 modules</small></td></tr>" in html
    assert "40 entries, 2 values" in html


def test_heat_map_section_names_median_and_largest(page, norms):
    html = page(norms={**norms, "lm_head": 0.5})
    assert "over 37 weights" in html
    assert "most in lm_head (50 %)" in html and "Outside the layers: lm_head 50 %." in html


def test_every_part_may_be_missing(page, history):
    bare = page(result=None, norms=None, history=[], card={}, settings={}, notes=[])
    parsed(bare)
    assert "<svg" not in bare and "<table" not in bare
    untested = page(result=None)
    assert "training loss" in untested and "Answers" not in untested
    parsed(page(norms={}, history=[{"step": 1, "split": "train", "loss": None}]))


def test_one_slot_is_not_a_comparison(page, result):
    alone = replace(
        result,
        metrics={name: {"base": scores["base"]} for name, scores in result.metrics.items()},
        differences={name: {} for name in result.metrics},
        samples=(),
    )
    html = page(result=alone)
    assert "<h2>Scores</h2>" in html and "Before and after" not in html
    assert "<em>22.0 to 53.0</em>" in html


@given(st.text())
def test_text_cannot_break_out(value):
    shown = text(value)
    assert "<" not in shown and '"' not in shown and ">" not in shown
    assert not re.search("[\x00-\x08\x0b-\x1f]", shown)


def test_hostile_text_everywhere(page, result):
    bad = '"><script>x</script>\x00\ud800'
    html = page(
        title=bad,
        card={bad: bad, "method": bad, "base_name": bad, "many": {f"{bad}{n}": n for n in range(20)}},
        settings={bad: [bad]},
        norms={f"h.0.{bad}": 0.1, bad: 0.1},
        notes=[bad],
        result=replace(result, settings={"dataset": bad}, notes=(bad + "2",)),
    )
    assert "<script" not in html
    parsed(html)


@pytest.mark.parametrize(
    "name, value, change, shown",
    [
        ("exact_match", 0.965, False, "96.5 %"),
        ("exact_match", -0.031, True, "\N{MINUS SIGN}3.1 pts"),
        ("loss", 2.1, False, "2.10"),
        ("loss", -0.5, True, "\N{MINUS SIGN}0.500"),
        ("perplexity", 8.14, False, "8.14"),
        ("perplexity", 12345.6, False, "12,346"),
        ("perplexity", 99.99, False, "100"),
        ("perplexity", 1e9, False, "1.00e+09"),
        ("loss", 0.0, True, "+0.00"),
    ],
)
def test_numbers(name, value, change, shown):
    assert _value(name, value, change) == shown


@pytest.mark.parametrize(
    "name, score, low, high, verdict",
    [
        ("exact_match", 0.2, 0.1, 0.3, "better"),
        ("exact_match", -0.2, -0.3, -0.1, "worse"),
        ("exact_match", 0.2, -0.1, 0.3, ""),
        ("loss", -0.2, -0.3, -0.1, "better"),
        ("perplexity", 0.2, 0.1, 0.3, "worse"),
        ("loss", -0.2, None, None, ""),
    ],
)
def test_verdict_needs_an_interval_without_zero(name, score, low, high, verdict):
    assert _verdict(name, Score(score, low, high, 10)) == verdict


def test_a_failed_write_leaves_the_old_page(page, tmp_path, monkeypatch):
    before = page()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        page(title="Another")
    assert (tmp_path / "report.html").read_text("utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
