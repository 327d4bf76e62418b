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

    def merge_into_base(*given: str, **way: Any) -> Any:
        calls.append((*given, *(f"{name}={value}" for name, value in way.items() if value)))
        return SimpleNamespace(to_json=lambda: REPORT)

    stub("veneer.merge.into_base", merge_into_base=merge_into_base)
    return calls


def test_merge_prints_the_error_report(veneer: Any, merged: list[tuple[str, ...]]) -> None:
    answer = veneer("merge", "out/a", "--into-base", "--output", "out/m", "--dtype", "bf16")
    assert answer.code == 0
    assert merged == [("out/a", "smollm2", "out/m", "bfloat16", "form=transformers", "storage=dense")]
    assert "q_proj" in answer.out
    assert "0.001" in answer.out


def test_json(veneer: Any, merged: list[tuple[str, ...]]) -> None:
    answer = veneer("merge", "out/a", "--base-model", "m", "--into-base", "--output", "out/m", "--json")
    assert json.loads(answer.out) == REPORT
    assert merged[0][1] == "m"


def test_other_forms(veneer: Any, merged: list[tuple[str, ...]]) -> None:
    answer = veneer("merge", "a", "--into-base", "--format", "gguf", "-o", "o")
    assert merged.pop()[4:] == ("form=gguf", "storage=dense") and "ollama create" in answer.err
    veneer("merge", "a", "--into-base", "--load-in-4bit", "--bnb-4bit-use-double-quant", "--force", "-o", "o")
    assert merged.pop()[4:] == ("form=transformers", "storage=nf4-dq", "force=True")
    for words, told in [
        (("--format", "gguf", "--load-in-4bit"), "llama-quantize"),
        (("--force",), "--force is for --load-in-4bit"),
        (("--load-in-8bit",), "leave --load-in-8bit out"),
    ]:
        answer = veneer("merge", "a", "--into-base", *words, "-o", "o")
        assert answer.code == 2 and told in answer.err and not merged
    assert "--format: for --into-base only" in veneer("merge", "a", "b", "--format", "gguf", "-o", "o").err


@pytest.mark.parametrize(
    "words", [("a", "--output", "o"), ("a", "b", "--into-base", "--output", "o"), ("a", "--into-base")]
)
def test_refused(veneer: Any, merged: list[tuple[str, ...]], words: tuple[str, ...]) -> None:
    assert (veneer("merge", *words).code, merged) == (2, [])
