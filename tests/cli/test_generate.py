"""`veneer generate` around a stand-in for the model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest


def test_a_prompt_is_answered_by_the_base(veneer: Any, model: Any) -> None:
    answer = veneer("generate", "hello", "--base-model", "smollm2")
    assert (answer.code, answer.out) == (0, "base hears hello\n")
    assert model.slots == {}


def test_a_prompt_is_answered_by_the_adapter(veneer: Any, model: Any) -> None:
    answer = veneer("generate", "--prompt", "hello", "--adapter", "out/a", "--temperature", "0.5", "--seed", "3")
    assert answer.out == "adapter hears hello\n"
    assert model.slots == {"adapter": "out/a"}
    [asked] = model.asked
    assert {**asked, "messages": None} == {
        "messages": None,
        "slot": "adapter",
        "max_new_tokens": 256,
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 3,
    }
    assert asked["messages"] == [{"role": "user", "content": "hello"}]


def test_json_keeps_what_libraries_print_apart(veneer: Any, model: Any) -> None:
    answer = veneer("generate", "hello", "--adapter", "out/a", "--json", "--system", "be brief")
    assert json.loads(answer.out) == {
        "base_model": "smollm2",
        "adapter": "out/a",
        "answers": [{"row": 0, "prompt": "hello", "texts": ["adapter hears hello"]}],
    }
    assert "a library that prints" in answer.err
    assert model.asked[0]["messages"][0] == {"role": "system", "content": "be brief"}


def test_the_system_prompt_of_the_training_is_the_default(veneer: Any, model: Any) -> None:
    answer = veneer("generate", "hello", "--adapter", "out/prompted")
    veneer("generate", "hello", "--adapter", "out/prompted", "--system", "other")
    assert [asked["messages"][0]["content"] for asked in model.asked] == ["as trained", "other"]
    assert "trained with the system prompt: as trained" in answer.err


def test_several_answers_differ_by_their_seed(veneer: Any, model: Any) -> None:
    words = (
        "generate",
        "hello",
        "--base-model",
        "m",
        "--num-return-sequences",
        "3",
        "--temperature",
        "1",
        "--seed",
        "5",
    )
    answer = veneer(*words)
    assert [asked["seed"] for asked in model.asked] == [5, 6, 7]
    assert answer.out == "\n---\n".join(["base hears hello"] * 3) + "\n"


def test_every_row_of_a_file(veneer: Any, model: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(3)))
    answer = veneer("generate", "--dataset", file, "--base-model", "m", "--limit", "2", "--batch-size", "4")
    assert [json.loads(line)["texts"] for line in answer.out.splitlines()] == [["base hears q0"], ["base hears q1"]]
    assert model.asked[0]["batch_size"] == 4


def test_a_prompt_from_a_pipe(veneer: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert veneer("generate", "-", "--base-model", "m").out == "base hears two\nlines\n"


def test_a_missing_file_is_told_before_a_model_is_loaded(veneer: Any, model: Any, tmp_path: Path) -> None:
    answer = veneer("generate", "--dataset", tmp_path / "no.jsonl", "--base-model", "m")
    assert answer.code == 2
    assert "no.jsonl" in answer.err
    assert "a library that prints" not in answer.err


def test_the_base_is_loaded_as_asked(veneer: Any, model: Any) -> None:
    veneer("generate", "hello", "--base-model", "smollm2")
    assert model.storage == "dense"
    veneer("generate", "hello", "--base-model", "smollm2", "--load-in-4bit", "--double-quant")
    assert model.storage == "nf4-dq"


def test_an_adapter_of_another_storage_is_told_of(veneer: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = sys.modules["veneer.adapter.take"]
    monkeypatch.setattr(stand_in, "storage_note", lambda adapter, storage, name: f"{name} beside {storage}")
    assert "note: adapter beside dense auto\n" in veneer("generate", "hello", "--adapter", "out/a").err
