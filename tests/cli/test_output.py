"""Results on standard output, the rest on standard error."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.cli.output import notes_told, print_facts, print_json, print_table, results, results_only, shown
from veneer.notes import Note, tell

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(JSON)
def test_any_result_is_one_line_of_json(value: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        import io

        stream = io.StringIO()
        patch.setattr("sys.stdout", stream)
        print_json(value)
    assert stream.getvalue().count("\n") == 1
    assert json.loads(stream.getvalue()) == finite(value)


def test_only_results_reach_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with results_only():
        print("noise")
        print("result", file=results())
    print("after")
    assert capsys.readouterr() == ("result\nafter\n", "noise\n")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_table_gives_way_to_json(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    print_table("scores [b]", ("a", "b"), [["[red]x[/red]", 0.5]], json=as_json)
    out, err = capsys.readouterr()
    shown_table, silent = (err, out) if as_json else (out, err)
    assert silent == ""
    assert "[red]x[/red]" in shown_table
    assert "scores [b]" in shown_table
    assert "0.5" in shown_table


def test_bytes_are_told_in_gib(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts("done", {"peak_memory_bytes": 1_258_860_544, "steps": 3}, json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["peak", "memory", "1.17", "GiB"] in lines and ["steps", "3"] in lines


def test_facts_open_objects_and_lists_of_objects(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        "train_seconds": 12.345678,
        "loss": {"train": 0.5, "eval": None},
        "modules": [{"name": "q_proj", "error": 1e-7}, {"name": "v_proj", "worst": 2}],
        "notes": ["kept short"],
    }
    print_facts("trained", facts, json=False)
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert ["train", "seconds", "12.35"] in lines
    assert ["eval", "-"] in lines
    assert ["q_proj", "1e-07", "-"] in lines
    assert ["v_proj", "-", "2"] in lines
    assert err == "note: kept short\n"


@dataclass
class Thing:
    x: int = 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (False, "no"),
        (None, "-"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (98765.4, "98,765"),
        (math.nan, "nan"),
        (["a", 1], "a, 1"),
        ({"a": 1}, "a=1"),
        ("text", "text"),
        (Thing(), "Thing(x=1)"),
    ],
)
def test_shown(value: object, text: str) -> None:
    assert shown(value) == text.replace("Thing", f"{Thing.__qualname__}")


def test_what_veneer_warns_of_is_a_note_and_what_others_warn_of_stays(capsys: Any) -> None:
    with notes_told(), warnings.catch_warnings():
        warnings.simplefilter("always")
        tell("experts stay as they are")
        with pytest.warns(DeprecationWarning, match="of another package"):
            warnings.warn("of another package", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: experts stay as they are\n"


def test_a_note_is_told_in_the_name_of_who_called() -> None:
    with pytest.warns(Note) as told:
        tell("here")
    assert told[0].filename == __file__
