"""Progress in a notebook, on a stand-in of IPython: one output, drawn anew; a terminal's IPython is no notebook."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from veneer.train.bars import NotebookBar, TerminalBar, bar


class Handle:
    """What `display(..., display_id=True)` gives back."""

    def __init__(self, first: str) -> None:
        self.shown = [first]

    def update(self, page: str) -> None:
        self.shown.append(page)


@pytest.fixture
def ipython(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ipython(shell): puts an IPython in place whose shell that is; returns the list of outputs."""

    def put(shell: Any) -> list[Handle]:
        outputs: list[Handle] = []

        def display(page: str, display_id: bool) -> Handle:
            assert display_id
            outputs.append(Handle(page))
            return outputs[-1]

        module, inner = types.ModuleType("IPython"), types.ModuleType("IPython.display")
        module.get_ipython = lambda: shell  # type: ignore[attr-defined]
        inner.HTML, inner.display = str, display  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", module)
        monkeypatch.setitem(sys.modules, "IPython.display", inner)
        return outputs

    return put


def test_a_notebook_has_one_output_that_moves(ipython: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NotebookBar, "EVERY", 0.0)
    outputs = ipython(types.SimpleNamespace(kernel=object()))
    shown = bar()
    shown.start({"default": (2, 10)})
    shown.update("default", 3, "loss 1.25 <b>")
    shown.stop()
    (output,) = outputs
    assert '<progress value="2" max="10">' in output.shown[0]
    assert '<progress value="3" max="10">' in output.shown[-1]
    assert "3/10 loss 1.25 &lt;b&gt;" in output.shown[-1]
    assert capsys.readouterr() == ("", "")


def test_steps_faster_than_the_eye_are_not_drawn_but_the_last_is(ipython: Any) -> None:
    (outputs, shown) = ipython(types.SimpleNamespace(kernel=object())), bar()
    shown.start({"default": (0, 1000)})
    for step in range(1, 1001):
        shown.update("default", step, "")
    shown.stop()
    assert len(outputs[0].shown) < 10
    assert 'value="1000"' in outputs[0].shown[-1]


@pytest.mark.parametrize("shell", [None, types.SimpleNamespace()])
def test_a_terminal_is_no_notebook(ipython: Any, shell: Any) -> None:
    ipython(shell)
    assert isinstance(bar(), TerminalBar)


def test_without_ipython_there_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert isinstance(bar(), TerminalBar)
