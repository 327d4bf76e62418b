"""The report of a run's folder: gathers what training and evaluation left there, and writes report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veneer.adapter.card import CARD
from veneer.config import read_yaml
from veneer.evaluate.report import write_report
from veneer.evaluate.result import Result

EVALUATION = "evaluation.json"


def report_run(output_dir: str | Path, result: Result | None = None) -> Path:
    """Writes output_dir/report.html; `result` is kept as evaluation.json, and read from there when it is not given."""
    folder = Path(output_dir)
    kept = folder / EVALUATION
    if result is not None:
        kept.write_text(json.dumps(result.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    elif kept.is_file():
        result = Result.from_json(json.loads(kept.read_text(encoding="utf-8")))
    card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
    training = dict(card.get("training", {}))
    norms = training.pop("update_norms", None)
    settings = read_yaml(folder / "run.yaml") if (folder / "run.yaml").is_file() else {}
    page = folder / "report.html"
    write_report(
        page,
        title=folder.resolve().name,
        card={**card, "training": training},
        settings=settings,
        history=_history(folder / "metrics.jsonl"),
        result=result,
        norms=norms,
        notes=[*training.get("warnings", []), *training.get("notes", [])],
    )
    return page


def _history(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
