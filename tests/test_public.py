"""The public names: all there, loaded only when used, the same for readers, type checkers and Python."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import veneer

FILE = Path(veneer.__file__)
HEAVY = ("torch", "transformers", "matplotlib", "pydantic", "numpy")


@pytest.mark.parametrize("name", veneer.PUBLIC)
def test_each_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(veneer, name).__doc__


def test_the_lists_of_names_agree() -> None:
    assert sorted(veneer.PUBLIC) == sorted(veneer.__all__)
    assert set(veneer.__all__) <= set(dir(veneer))
    assert _names_for_type_checkers() == veneer.PUBLIC


def _names_for_type_checkers() -> dict[str, str]:
    guarded = next(node for node in ast.parse(FILE.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: f"{node.module}:{alias.name}" for node in imports for alias in node.names}


@pytest.mark.parametrize("module", ["veneer", "veneer.errors", "veneer.cli.__main__"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "matplotlib") if "cli" in module else HEAVY
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_that_of_the_installed_package() -> None:
    assert veneer.__version__ == metadata.version("veneer")


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'loads'.*load"):
        _ = veneer.loads
