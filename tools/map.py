"""Write docs/map.md: every module of veneer with the first line of its docstring. `--check` only compares."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAP = ROOT / "docs" / "map.md"
HEAD = """# Map

Every file of `veneer/` and what it is for, from the first line of its docstring. Made by `make map`; do not edit.

```
"""


def page(root: Path = ROOT) -> str:
    """The text of docs/map.md for the tree below `root`; a module without a docstring is an error."""
    package = root / "veneer"
    top = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    parts = sorted(top, key=lambda path: (path.is_dir(), path.name))
    lines = [f"veneer/{'':25}{_purpose(package / '__init__.py', root)}"]
    for part in parts:
        lines += _folder(part, root) if part.is_dir() else [_line(part, "  ", root)]
    return HEAD + "\n".join(line for line in lines if line) + "\n```\n"


def _folder(folder: Path, root: Path) -> list[str]:
    head = f"  {folder.name + '/':30}{_purpose(folder / '__init__.py', root)}"
    return [head, *(_line(file, "    ", root) for file in sorted(folder.rglob("*.py")))]


def _line(file: Path, indent: str, root: Path) -> str:
    if file.name == "__init__.py":  # stands for its folder, one line above
        return ""
    return f"{indent}{file.name:{32 - len(indent)}}{_purpose(file, root)}"


def _purpose(file: Path, root: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not text:
        raise SystemExit(f"{file.relative_to(root)}: no docstring; its first line says what the file is for")
    return text.partition("\n")[0]


def main(words: list[str]) -> int:
    """Write the page, or with --check say whether it is up to date; returns the exit code."""
    wanted = page()
    if "--check" not in words:
        MAP.write_text(wanted, encoding="utf-8")
        return 0
    if MAP.exists() and MAP.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{MAP.relative_to(ROOT)} is not up to date; run: make map", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
