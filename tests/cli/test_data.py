"""`veneer data preview` around a stand-in for the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def rows(tmp_path: Path, stub: Any) -> Path:
    def encode(rows: list[Any], template: Any, max_length: int, path: str) -> Any:
        return SimpleNamespace(rows=len(rows), max_length=max_length, system=template.system)

    def template(tokenizer: str, system_prompt: str | None) -> Any:
        return SimpleNamespace(system=system_prompt)

    stub("veneer.model.load", load_tokenizer=lambda name: f"tokenizer of {name}")
    stub("veneer.data.chat", Template=template)
    stub("veneer.data.encode", encode=encode)
    stub(
        "veneer.data.preview",
        summary=lambda encoded: {"rows": encoded.rows, "max_length": encoded.max_length, "system": encoded.system},
        preview=lambda encoded, tokenizer, n: f"{n} of {encoded.rows} rows by the {tokenizer}",
    )
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    return file


def test_preview(veneer: Any, rows: Path) -> None:
    answer = veneer("data", "preview", rows, "--base-model", "smollm2", "--n", "2")
    assert (answer.code, answer.out, answer.err) == (0, "2 of 1 rows by the tokenizer of smollm2\n", "")


def test_json_is_the_summary(veneer: Any, rows: Path) -> None:
    answer = veneer(
        "data", "preview", "--dataset", rows, "--model", "m", "--cutoff-len", "7", "--system", "s", "--json"
    )
    assert json.loads(answer.out) == {"rows": 1, "max_length": 7, "system": "s"}


@pytest.mark.parametrize("words", [(), ("prevew", "x.jsonl")])
def test_other_commands_are_refused(veneer: Any, words: tuple[str, ...]) -> None:
    answer = veneer("data", *words)
    assert (answer.code, answer.out) == (2, "")
    assert "write veneer data preview FILE.jsonl" in answer.err


def test_help_with_and_without_preview(veneer: Any) -> None:
    assert veneer("data", "--help").out == veneer("data", "preview", "--help").out


def test_a_missing_file(veneer: Any, rows: Path) -> None:
    answer = veneer("data", "preview", rows.with_name("no.jsonl"), "--base-model", "m")
    assert answer.code == 2
    assert "no.jsonl" in answer.err
