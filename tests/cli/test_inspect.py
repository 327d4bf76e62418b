"""`veneer inspect` from the command line: tables, JSON, page, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest

from tests.measure.making import random


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
