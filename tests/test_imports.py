"""Imports point down: the check itself, and proof that it can fail."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "veneer"

# Part of the package -> level. A part may import those of a lower level, and itself.
LEVELS = {
    "errors": 0,
    "notes": 0,
    "lowrank": 0,
    "kernels": 0,
    "config": 1,
    "places": 1,
    "bases": 1,
    "data": 1,
    "methods": 2,
    "model": 3,
    "adapter": 4,
    "evidence": 5,
    "plan": 5,
    "merge": 5,
    "store": 5,
    "measure": 6,
    "train": 6,
    "compose": 6,
    "evaluate": 7,
    "serve": 8,
    "cli": 9,
}
TABLE_ENTRY = re.compile(r"(veneer(?:\.\w+)+):\w+")  # a member of a table, "module:Name", is an import too


def wrong_imports(package: Path) -> list[str]:
    """Every import below `package` that is relative, of the package root, or does not point down."""
    faults = []
    for file in sorted(package.rglob("*.py")):
        inside = file.relative_to(package)
        if inside == Path("__init__.py"):  # the public names: it may point anywhere, and nothing points at it
            continue
        here = inside.parts[0].removesuffix(".py")
        if here not in LEVELS:
            faults.append(f"{inside}: {here} has no level; give it one in {Path(__file__).name}")
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        faults += [f"{inside}:{node.lineno}: {fault}" for node in ast.walk(tree) for fault in _faults(node, here)]
    return faults


def _faults(node: ast.AST, here: str) -> list[str]:
    if isinstance(node, ast.ImportFrom) and node.level:
        return ["relative import; wanted the full path"]
    return [fault for module in _modules(node) if (fault := _fault(module, here))]


def _modules(node: ast.AST) -> list[str]:
    """Full names of what a node imports; `from veneer import x` counts as the package root."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and (entry := TABLE_ENTRY.fullmatch(node.value)):
        return [entry[1]]
    return []


def _fault(module: str, here: str) -> str:
    root, _, rest = module.partition(".")
    there = rest.partition(".")[0]
    if root != "veneer" or there == here:
        return ""
    if not there:
        return "imports the package root; wanted the module that holds the name"
    if there not in LEVELS:
        return f"imports veneer.{there}, which has no level"
    if LEVELS[there] >= LEVELS[here]:
        return f"{here} (level {LEVELS[here]}) imports {there} (level {LEVELS[there]}); imports point down"
    return ""


def test_imports_point_down() -> None:
    assert wrong_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("data/chat.py", "from veneer.train.loop import loop", "imports point down"),
        ("data/chat.py", "from veneer.bases.dense import Dense", "imports point down"),  # same level: strangers
        ("data/chat.py", "def f():\n    import veneer.cli.train", "imports point down"),
        ("methods/__init__.py", 'METHODS = {"lora": "veneer.model.leaf:Leaf"}', "imports point down"),
        ("train/loop.py", "from .checkpoint import save", "relative import"),
        ("train/loop.py", "import veneer", "package root"),
        ("train/loop.py", "from veneer import load", "package root"),
        ("train/loop.py", "from veneer.utils import tidy", "no level"),
        ("utils.py", "x = 1", "utils has no level"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str, fault: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(line + "\n", encoding="utf-8")
    (found,) = wrong_imports(tmp_path)
    assert fault in found
    assert file in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("train/loop.py", "from veneer.model.packed import Stream\nimport torch"),
        ("train/loop.py", "from veneer.train.optim import AdamW"),  # same folder
        ("__init__.py", "from veneer.cli.train import main"),
        ("evaluate/metrics.py", 'METRICS = {"bleu": "veneer.evaluate.metrics:bleu"}'),
    ],
)
def test_a_right_import_is_not_found(tmp_path: Path, file: str, line: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(line + "\n", encoding="utf-8")
    assert wrong_imports(tmp_path) == []
