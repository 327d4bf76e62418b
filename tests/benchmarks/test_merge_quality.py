"""The work of the merge experiment in parts: nothing twice, nothing left out, and joined again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.merge_quality import join, part_of


def test_parts() -> None:
    assert part_of("2/4") == (2, 4)
    for text in ("0/4", "5/4", "2", "a/b"):
        with pytest.raises(ValueError):
            part_of(text)


def test_outputs_of_parts_are_joined_entry_by_entry(tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [
        {"commit": "c", "base": {"b": {"score": 1}}, "pairs": {"a--b": {"svd": 1}}, "kept": {"old": 0}},
        {"commit": "d", "base": {"a": {"score": 2}}, "pairs": {"a--b": {"linear 1": 2}, "a--c": {"svd": 3}}},
    ]
    files = [tmp_path / f"{n}.json" for n in range(2)]
    for file, part in zip(files, parts, strict=True):
        file.write_text(json.dumps(part), encoding="utf-8")
    joined = join(files, ("base", "pairs"))
    assert joined == {
        "commit": "c",
        "base": {"a": {"score": 2}, "b": {"score": 1}},
        "pairs": {"a--b": {"svd": 1, "linear 1": 2}, "a--c": {"svd": 3}},
        "kept": {"old": 0},
    }
    assert list(joined["base"]) == ["a", "b"]
