"""The tables of the GPU comparison: what docs/gpu.md shows is the file."""

from __future__ import annotations

import re

from benchmarks import record
from benchmarks.gpu_table import page
from benchmarks.gpu_train import NAME, load

BLOCK = re.compile(r"<!-- table: gpu_train -->\n(.*)<!-- end of table -->", re.DOTALL)


def test_the_document_shows_the_file() -> None:
    text = (record.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    [shown] = BLOCK.findall(text)
    held = load(record.RESULTS / f"{NAME}.json")
    assert shown.strip() == page(held), "next: python -m benchmarks.gpu_train --show, between the two comments"


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
