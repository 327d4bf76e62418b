"""The tables of the GPU comparison: what docs/gpu.md shows is the file."""

from __future__ import annotations

import re

import pytest

from benchmarks import record
from benchmarks.gpu_table import page
from benchmarks.gpu_train import NAME, load


@pytest.mark.parametrize("name", [NAME, f"{NAME}_h100"])
def test_the_document_shows_the_file(name: str) -> None:
    text = (record.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    [shown] = re.findall(rf"<!-- table: {name} -->\n(.*?)<!-- end of table -->", text, re.DOTALL)
    path = record.RESULTS / f"{name}.json"
    next_step = f"next: python -m benchmarks.gpu_train --show --output {path}, between the two comments"
    assert shown.strip() == page(load(path)), next_step


def test_rows_that_nobody_measured_are_left_out() -> None:
    entry = {"variant": {"batch": 2, "passes": 1, "recompute": "none", "compile": True}, "tokens_per_second": 1234.5}
    entry |= {
        "peak_gib": 3.0,
        "driver_gib": 4.0,
        "gpu": {"name": "H100"},
        "date": "2026-01-02",
        "versions": {"torch": "2"},
    }
    held = {"rows": {"8b-bf16": {"systems": {"ours": entry, "peft": {"trials": []}}, "ratios": {}}}}
    held["rows"]["8b-fp8"] = {"systems": {"ours-fp8": {"trials": []}}, "ratios": {}}
    shown = page(held)
    assert "| ours | 2 x 1 | none | yes | 1,234 | 3.00 | 4.00 |" in shown and "| peft |" not in shown
    assert "8B, bf16" in shown and "fp8 base" not in shown
    assert shown.splitlines()[-1] == "H100, 2026-01-02; torch 2."
