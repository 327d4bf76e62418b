"""What the documents say is true: commands exist, links lead somewhere, figures are those that were measured.

A figure in a document is marked with where it comes from, and is compared as rounded there:

    <!-- figure: benchmarks/results/cpu_train.json#ratio.peft.median -->3.1
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if path.exists())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://|mailto:)([^)#\s]*)(?:#[^)\s]*)?\)")
FIGURE = re.compile(r"<!-- figure: (\S+?)#(\S+) -->\s*\**(-?[\d,]+(?:\.\d+)?)?")
SHELLS = {"", "sh", "bash", "shell", "console"}

# A machine's or a workplace's own words have no meaning to who reads the repository. Each pattern -> where it may not
# stand; \x2f is the slash and \x20 the space, so that this file does not find itself.
FORBIDDEN = {
    r"\x2f(?:work|root|opt\x2fwheels|opt\x2fpypi)\x2f": "*",
    r"\x2fhome\x2f\w+\x2f": "*",
    r"\b(?:py\x70i|pythonh\x6fsted)\.(?:org|io)\b": "*",
    r"\bissue\x20#?\d+": "*",
    r"\bsessions?\b": "*.md",
}


def documents(name: str = "*.md") -> Any:
    return pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.match(name)], ids=lambda d: d.name)


# ------------------------------------------------------------------------------------------------------------ the map


def test_the_map_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "map.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """The `veneer` and `make` command lines in the shell fences of a document, as words."""
    found = []
    for language, body in FENCE.findall(text):
        if language in SHELLS:
            lines = body.replace("\\\n", " ").splitlines()
            found += [re.sub(r"^\s*\$\s+", "", line) for line in lines]
    words = [shlex.split(line, comments=True) for line in found if re.match(r"\s*(?:veneer|make)\s+\w", line)]
    return [line for line in words if len(line) > 1]


def command_faults(words: list[str]) -> list[str]:
    """What is wrong with one command line: an unknown verb, option or target."""
    if words[0] == "make":
        targets = re.findall(r"^([\w.$()/]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return [f"make {word}: no such target" for word in words[1:] if "=" not in word and word not in targets]
    verb = words[1:3] if words[1] == "data" else words[1:2]
    known = options(*verb)
    if known is None:
        return [f"veneer {' '.join(verb)}: no such verb"]
    used = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    return [f"veneer {' '.join(verb)}: no option --{name}" for name in used if name not in known]


@functools.cache
def options(*verb: str) -> frozenset[str] | None:
    """Names that `veneer VERB --help` lists, other spellings among them; None where there is no such verb."""
    command = [sys.executable, "-m", "veneer.cli", *verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        return None
    listed = re.findall(r"--(?:\[no-\])?([a-z][a-z0-9-]*)", done.stdout)
    _, _, spellings = " ".join(done.stdout.split()).partition("Other spellings: ")
    return frozenset(listed) | frozenset(re.findall(r"[a-z][a-z0-9-]*", spellings))


@documents()
def test_commands_exist(document: Path) -> None:
    lines = commands(document.read_text(encoding="utf-8"))
    assert [fault for words in lines for fault in command_faults(words)] == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("veneer trian --r 8", "no such verb"),
        ("veneer train --learning-rat 1e-4", "no option --learning-rat"),
        ("veneer data preview --seeed 1", "no option --seeed"),
        ("make coffee", "no such target"),
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, fault: str) -> None:
    (words,) = commands(f"```bash\n$ {line}  # a comment\n```\n") if not line.startswith("make") else [line.split()]
    (found,) = command_faults(words)
    assert fault in found


def test_commands_that_exist_are_not_found() -> None:
    text = "```\nveneer train --base-model smollm2 \\\n  --dataset d.jsonl --r 8 --lr 1e-4 --json\nmake demo\n```\n"
    assert [command_faults(words) for words in commands(text)] == [[], []]


# -------------------------------------------------------------------------------------------------------------- links


def broken_links(document: Path) -> list[str]:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    return [target for target in LINK.findall(text) if target and not (document.parent / target).exists()]


@documents()
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[itself](page.md#top) [away](https://example.org) [gone](gone.md)", encoding="utf-8")
    assert broken_links(page) == ["gone.md"]


# ------------------------------------------------------------------------------------------------------------ figures


def figure_faults(text: str, root: Path) -> list[str]:
    """Marked figures that differ from the JSON value they name, rounded to the digits shown."""
    faults = []
    for file, key, shown in FIGURE.findall(FENCE.sub("", text)):
        value = _value(root / file, key)
        digits = len(shown.partition(".")[2])
        if not isinstance(value, (int, float)) or not shown or f"{value:.{digits}f}" != shown.replace(",", ""):
            faults.append(f"{file}#{key}: the document says {shown or 'no number'}, the file {value}")
    return faults


def _value(file: Path, key: str) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
    except (OSError, KeyError, IndexError, ValueError) as error:
        return f"has no such value ({type(error).__name__})"
    return value


@documents()
def test_figures_are_those_measured(document: Path) -> None:
    assert figure_faults(document.read_text(encoding="utf-8"), ROOT) == []


@pytest.mark.parametrize(
    ("mark", "right"),
    [
        ("r.json#a.b -->2.9", True),
        ("r.json#a.b -->**2.87**", True),
        ("r.json#rounds.1 -->1,234", True),
        ("r.json#a.b -->2.8", False),
        ("r.json#a.c -->2.9", False),
        ("gone.json#a.b -->2.9", False),
        ("r.json#a.b -->about three", False),
    ],
)
def test_a_wrong_figure_is_found(tmp_path: Path, mark: str, right: bool) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"a": {"b": 2.8725}, "rounds": [1, 1233.6]}), encoding="utf-8")
    assert (figure_faults(f"<!-- figure: {mark} times", tmp_path) == []) is right


# ---------------------------------------------------------------------------------------------------- words forbidden


def forbidden_words(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # an image, say
        return []
    return [m[0] for pattern, where in FORBIDDEN.items() if file.match(where) for m in re.finditer(pattern, text)]


def test_nothing_names_a_machine_or_a_workplace() -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.splitlines() if name != "LICENSE"]
    found = {
        str(file.relative_to(ROOT)): words for file in files if file.is_file() and (words := forbidden_words(file))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text", ["see " + "/work" + "/main/x.py", "fixes issue" + " #7", "from py" + "pi.org", "a session"]
)
def test_a_forbidden_word_is_found(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert len(forbidden_words(page)) == 1
