"""`veneer inspect` from the command line: tables, JSON, page, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest
import torch

from tests.evaluate.pico_reader import pico_reader
from tests.measure.making import made, random


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [random(seed, rank=2 + seed).save(tmp_path / f"s{seed}") for seed in range(3)]


def test_one(veneer: Any, folders: list[Path]) -> None:
    answer = veneer("inspect", folders[0])
    assert answer.code == 0
    for word in ("verified", "q_proj", "down_proj", "eff. rank"):
        assert word in answer.out


def test_json_of_several(veneer: Any, folders: list[Path]) -> None:
    answer = veneer("inspect", *folders, "--json", "--rank", 3)
    told = json.loads(answer.out)
    assert told["rank"] == 3
    assert [one["name"] for one in told["adapters"]] == ["s0", "s1", "s2"]
    assert [(one["first"], one["second"]) for one in told["pairs"]] == [("s0", "s1"), ("s0", "s2"), ("s1", "s2")]
    assert told["together"]["alignment"].keys() == {"s0", "s1", "s2"}
    assert "cosine" in answer.err


@pytest.mark.parametrize(("rank", "code"), [(16, 0), (17, 2)])
def test_the_exit_code_says_whether_the_target_loads_it(veneer: Any, tmp_path: Path, rank: int, code: int) -> None:
    answer = veneer("inspect", random(0, rank).save(tmp_path / "a"), "--target", "vllm", "--json")
    assert answer.code == code
    assert json.loads(answer.out)["adapters"][0]["target"]["loads"] is (code == 0)
    assert ("--to peft --rank 16" in answer.err) is (code == 2)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_page_is_whole_and_loads_nothing(veneer: Any, tmp_path: Path, count: int) -> None:
    many = [random(seed).save(tmp_path / f"s{seed}") for seed in range(count)]
    page = tmp_path / "page.html"
    assert veneer("inspect", *many, "--output", page, "--target", "peft").code == 0
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=|url\((?!#)|<script", text)
    drawings = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(drawings) == {1: 2, 3: 2 * 3 + 5, 9: 0}[count]
    for drawing in drawings:
        minidom.parseString(drawing.replace("xlink:", "").encode())
    veneer("inspect", *many, "--output", tmp_path / "again.html", "--target", "peft")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_a_name_is_text_in_the_page(veneer: Any, tmp_path: Path) -> None:
    odd = [random(seed).save(tmp_path / f"<b>{seed}") for seed in range(2)]
    assert veneer("inspect", *odd, "--output", tmp_path / "page.html").code == 0
    assert "<b>0<" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--adapters"),
        (("nowhere",), "no such folder"),
        (("nowhere", "--target", "tgi"), "--target"),
        (("nowhere", "--output", "page.json"), ".html"),
        (("nowhere", "--load-in-4bit"), "--base-model"),
        (("a", "b", "--base-model", "m", "--dataset", "x.jsonl"), "a file for each adapter, in their order: 2, got 1"),
        (("a", "--base-model", "m", "--dataset", "x.jsonl", "y.jsonl"), "in their order: 1, got 2"),
        (("a", "--base-model", "m", "--dataset", "x.jsonl"), "2 to 8 adapters"),
        (("a", "b", "--dataset", "x.jsonl,y.jsonl"), "--base-model"),
        (("a", "b", "--limit", "3", "--seed", "1"), "--limit and --seed are for --dataset"),
        (("a", "b", "--base-model", "m", "--dataset", "x.jsonl", "y.csv"), "x.jsonl"),
    ],
)
def test_bad_input(veneer: Any, words: tuple[str, ...], says: str) -> None:
    answer = veneer("inspect", *words)
    assert (answer.code, answer.out) == (2, "")
    assert says in answer.err


def test_a_broken_adapter_is_the_usual_error(veneer: Any, folders: list[Path]) -> None:
    whole = (folders[0] / "adapter_model.safetensors").read_bytes()
    (folders[0] / "adapter_model.safetensors").write_bytes(whole[:-4])
    answer = veneer("inspect", folders[0], "--target", "vllm")
    assert answer.code == 2
    assert "cannot be loaded" in answer.err


def test_with_data(veneer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, JSON and page of two adapters, with a base that is made here."""
    base = pico_reader()
    monkeypatch.setattr("veneer.model.load.load", lambda *_, **__: base)
    modules = {path: (module.in_features, module.out_features) for path, module in linear_layers(base.model)}
    words: list[Any] = ["inspect"]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        factors = {
            m: (torch.randn(2, i, generator=generator) / 8, torch.randn(o, 2, generator=generator) / 8)
            for m, (i, o) in modules.items()
        }
        words.append(made(factors).save(tmp_path / f"s{seed}"))
    for file in ("a.jsonl", "b.jsonl"):
        rows = [{"question": f"{n} and {file}", "completion": str(n)} for n in range(6)]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words += ["--base-model", "pico", "--columns", "prompt=question", "--limit", 4]
    words += ["--dataset", tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    answer = veneer(*words, "--json", "--output", tmp_path / "page.html")
    assert answer.code == 0
    told = json.loads(answer.out)
    first, second = told["data"]
    assert told["foretold"] == []
    assert "s0 : s1: what a merge keeps is not foretold: s0 and s1 do not surely gain" in answer.err
    assert (first["adapter"], second["adapter"], first["rows"]) == ("s0", "s1", 4)
    [beside] = first["beside"]
    assert beside["other"] == "s1"
    assert beside["functional"]["layers"] == 14
    assert beside["change"]["score"] == pytest.approx(beside["loss"]["score"] - first["base"]["score"])
    assert beside["summed_change"]["score"] == pytest.approx(beside["summed"]["score"] - first["loss"]["score"])
    assert "A/2 + B/2" in answer.err
    assert "s0 : s1" in answer.err
    assert "Written on the inputs of s0" in (tmp_path / "page.html").read_text(encoding="utf-8")


def linear_layers(model: Any) -> list[tuple[str, Any]]:
    return [(p, m) for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and p != "lm_head"]
