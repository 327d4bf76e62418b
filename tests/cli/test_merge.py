"""`veneer merge --into-base` around a stand-in for merging."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

REPORT = {"output": "out/m", "modules": [{"module": "q_proj", "relative_error": 1e-3}], "largest_error": 1e-3}


@pytest.fixture
def merged(stub: Any, model: Any) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []

    def merge_into_base(*given: str) -> Any:
        calls.append(given)
        return SimpleNamespace(to_json=lambda: REPORT)

    stub("veneer.merge.into_base", merge_into_base=merge_into_base)
    return calls


def test_merge_prints_the_error_report(veneer: Any, merged: list[tuple[str, ...]]) -> None:
    answer = veneer("merge", "out/a", "--into-base", "--output", "out/m", "--dtype", "bf16")
    assert answer.code == 0
    assert merged == [("out/a", "smollm2", "out/m", "bfloat16")]
    assert "q_proj" in answer.out
    assert "0.001" in answer.out


def test_json(veneer: Any, merged: list[tuple[str, ...]]) -> None:
    answer = veneer("merge", "out/a", "--base-model", "m", "--into-base", "--output", "out/m", "--json")
    assert json.loads(answer.out) == REPORT
    assert merged[0][1] == "m"


@pytest.mark.parametrize(
    "words", [("a", "--output", "o"), ("a", "b", "--into-base", "--output", "o"), ("a", "--into-base")]
)
def test_refused(veneer: Any, merged: list[tuple[str, ...]], words: tuple[str, ...]) -> None:
    assert (veneer("merge", *words).code, merged) == (2, [])
