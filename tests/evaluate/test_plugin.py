"""A metric of one's own: found by file or module, checked in what it returns, named in every fault."""

from __future__ import annotations

import pytest

from veneer.errors import ConfigError
from veneer.evaluate.intervals import RATIO
from veneer.evaluate.metrics import check_names, metric


@pytest.fixture
def own(tmp_path):
    """Writes a metric's file and gives the name of its function."""

    def write(body, name="score"):
        (tmp_path / "mine.py").write_text(body)
        return f"{tmp_path / 'mine.py'}:{name}"

    return write


def returning(value):
    return f"nan, inf = float('nan'), float('inf')\ndef score(predictions, references):\n    return {value}\n"


def test_a_function_of_a_file_is_a_metric_of_any_range(own):
    spec = own(
        "def score(predictions, references):\n    return [len(p) - len(r[0]) for p, r in zip(predictions, references)]"
    )
    check_names([spec, "loss"])
    found = metric(spec)
    assert found(["abc", ""], [["a"], ["ab"]]) == [2.0, -2.0]
    assert found.summary is RATIO


def test_a_function_of_a_module(monkeypatch, tmp_path):
    (tmp_path / "veneer_test_mine.py").write_text(returning("[True] * len(predictions)"))
    monkeypatch.syspath_prepend(tmp_path)
    assert metric("veneer_test_mine:score")(["a"], [["b"]]) == [1.0]


def test_the_file_runs_once(own, tmp_path):
    spec = own(
        f"import pathlib\npathlib.Path({str(tmp_path / 'runs')!r}).touch(exist_ok=False)\n"
        + returning("[0] * len(predictions)")
    )
    check_names([spec])
    metric(spec)
    assert (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "value, words",
    [
        ("0.5", "returned 0.5, wanted a list of 2 numbers"),
        ("None", "returned null"),
        ("'ab'", "returned text"),
        ("{'a': 1, 'b': 2}", "returned an object"),
        ("[1.0]", "returned 1 values, wanted a list of 2 numbers"),
        ("[1.0, nan]", r"no finite number(.|\n)*row 2: nan"),
        ("[-inf, 1.0]", r"row 1: -inf"),
        ("['1', None]", r"row 1: text(.|\n)*row 2: null"),
        ("[[1], 1]", "row 1: a list"),
        ("1 / 0", r"failed: ZeroDivisionError: division by zero \(mine.py, line 3\)"),
        ("exit()", "asked to end the program"),
    ],
)
def test_what_it_returns_is_checked(own, value, words):
    spec = own(returning(value))
    with pytest.raises(ConfigError, match=words) as caught:
        metric(spec)(["a", "b"], [["a"], ["b"]])
    assert spec in str(caught.value)


@pytest.mark.parametrize(
    "body, name, words",
    [
        ("def score(p, r): ...", "scor", "no function 'scor'.*Did you mean score"),
        ("score = 3", "score", "no function 'score'"),
        ("def score(:", "score", "cannot be loaded: SyntaxError"),
        ("import no_such_module", "score", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "score", r"cannot be loaded: ZeroDivisionError.*line 1"),
    ],
)
def test_a_file_that_cannot_be_used(own, body, name, words):
    with pytest.raises(ConfigError, match=words):
        check_names([own(body, name)])


@pytest.mark.parametrize(
    "spec, words",
    [
        ("nowhere.py:score", "nowhere.py does not exist"),
        ("no_such_module:score", "no module 'no_such_module' is installed.*for a file write"),
        (":score", "names no function"),
        ("file.py:", "names no function"),
    ],
)
def test_nothing_there(spec, words):
    with pytest.raises(ConfigError, match=words):
        check_names([spec])
