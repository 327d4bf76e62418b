"""Exit codes, messages, and how little is imported on the way to a message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from veneer.cli.__main__ import VERBS, _others_running, _wait_politely
from veneer.errors import DataError

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "rich", "peft", "gguf", "jinja2", "yaml")


def process(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "veneer.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def imported(*words: str) -> set[str]:
    """The packages that a command line imports."""
    code = (
        "import sys, contextlib, io\n"
        "from veneer.cli.__main__ import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main({list(words)!r})\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = process(code=code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_help_lists_every_verb_and_imports_nothing() -> None:
    done = process("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {verb} " in done.stdout for verb in VERBS)
    assert not imported("--help") & {*HEAVY, "pydantic"}


@pytest.mark.parametrize(
    "words", [("train",), ("eval",), ("generate",), ("chat",), ("merge",), ("push",), ("demo",), ("data", "preview")]
)
def test_help_of_a_verb_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    assert not imported(*words, "--help") & set(HEAVY)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train", "--r", "0"), "--r: got 0, wanted a value greater than or equal to 1"),
        (("train", "--r", "-3"), "--r: got -3, wanted a value greater than or equal to 1"),
        (("train", "--learning-rate", "nan"), "--learning-rate: got nan, wanted a finite number"),
        (("train", "--lerning-rate", "1"), "unknown option --lerning-rate; did you mean --learning-rate?"),
        (("train", "nowhere.yaml"), "nowhere.yaml: No such file"),
        (("trian",), "unknown verb trian; did you mean train?"),
    ],
)
def test_bad_input_in_a_process_of_its_own(words: tuple[str, ...], told: str) -> None:
    done = process(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("veneer: ")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_at_all_is_bad_input_and_shows_the_verbs(veneer: Any) -> None:
    answer = veneer()
    assert (answer.code, answer.out) == (2, "")
    assert "usage: veneer VERB" in answer.err


@pytest.mark.parametrize("words", [("-h",), ("help",), ("--version",), ("help", "train"), ("train", "-h")])
def test_what_was_asked_for_is_a_result(veneer: Any, words: tuple[str, ...]) -> None:
    answer = veneer(*words)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith("veneer")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, stub: Any) -> Any:
    """A verb that does what the test says."""

    def put(run: Any) -> None:
        stub("a_verb", run=run)
        monkeypatch.setitem(VERBS, "verb", ("a_verb:run", "for the test"))

    return put


def raising(error: BaseException) -> Any:
    def run(argv: object) -> int:
        raise error

    return run


def test_our_errors_are_messages(veneer: Any, verb: Any) -> None:
    verb(raising(DataError("rows.jsonl is empty")))
    answer = veneer("verb")
    assert (answer.code, answer.out, answer.err) == (2, "", "veneer: rows.jsonl is empty\n")


def test_a_bug_says_so_below_its_traceback(veneer: Any, verb: Any) -> None:
    verb(raising(ZeroDivisionError("division by zero")))
    answer = veneer("verb")
    assert answer.code == 1
    assert "Traceback" in answer.err
    assert "this is a bug in veneer" in answer.err.splitlines()[-1]


def test_a_full_disk_is_not_a_bug(veneer: Any, verb: Any) -> None:
    verb(raising(OSError(28, "No space left on device", "out/x")))
    answer = veneer("verb")
    assert (answer.code, "Traceback" in answer.err) == (2, False)
    assert "No space left on device: out/x" in answer.err


def test_a_full_disk_in_the_words_of_safetensors(veneer: Any, verb: Any) -> None:
    from safetensors import SafetensorError

    verb(raising(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")))
    answer = veneer("verb")
    assert (answer.code, "Traceback" in answer.err) == (2, False)
    assert "No space left on device" in answer.err
    verb(raising(SafetensorError("HeaderTooLarge")))
    assert veneer("verb").code == 1


def test_interrupted(veneer: Any, verb: Any) -> None:
    verb(raising(KeyboardInterrupt()))
    answer = veneer("verb")
    assert (answer.code, answer.err) == (130, "veneer: interrupted\n")


def test_a_verb_that_prints_does_not_spoil_the_results(veneer: Any, verb: Any) -> None:
    from veneer.cli.output import print_json

    def run(argv: list[str]) -> None:
        print("noise")
        print_json({"words": argv})

    verb(run)
    answer = veneer("verb", "a")
    assert json.loads(answer.out) == {"words": ["a"]}
    assert answer.err == "noise\n"
    assert answer.code == 0


def without_a_reader(*words: str) -> tuple[bytes, int]:
    """What Python says on standard error, and its exit code, where nobody reads its standard output."""
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as talker:
        assert talker.stdout is not None
        assert talker.stderr is not None
        talker.stdout.close()
        said = talker.stderr.read()
    return said, talker.returncode


@pytest.mark.parametrize("lines", [50, 100_000])
def test_a_reader_that_leaves_is_no_bug(lines: int) -> None:
    code = (
        "import sys, types\n"
        "from veneer.cli import __main__, output\n"
        "run = lambda argv: [print('x' * 99, file=output.results()) for _ in range(int(sys.argv[1]))] and None\n"
        "sys.modules['talker'] = types.SimpleNamespace(run=run)\n"
        "__main__.VERBS['talk'] = ('talker:run', '')\n"
        "sys.exit(__main__.main(['talk']))\n"
    )
    assert without_a_reader("-c", code, str(lines)) == (b"", 141)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"]])
def test_a_reader_of_help_that_leaves_is_no_bug_either(words: list[str]) -> None:
    assert without_a_reader("-m", "veneer.cli", *words) == (b"", 141)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_letters_that_the_terminal_lacks(encoding: str) -> None:
    code = (
        "from veneer.cli import output\n"
        "output.write_anything()\n"
        "output.print_json({'text': chr(233) + chr(0x1F600) + chr(0xD800)})\n"
        "output.say(chr(0x1F600))\n"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, timeout=60, check=True, env=environment)
    assert json.loads(done.stdout.decode(encoding))["text"] == chr(233) + chr(0x1F600) + chr(0xD800)


def test_the_table_names_files_that_are_there() -> None:
    folder = Path(sys.modules["veneer.cli.__main__"].__file__ or "").parent
    assert {spot for spot, _ in VERBS.values()} == {f"veneer.cli.{verb}:run" for verb in VERBS}
    assert all((folder / f"{verb}.py").exists() for verb in VERBS)


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("0.00 0.01 0.05 1/78 4711\n", 0),
        ("1.90 0.3 0.1 3/78 4711\n", 2),
        ("1.9 0.3\n", 0),
        ("a b c d e\n", 0),
        (None, 0),
    ],
)
def test_how_many_others_want_a_core(tmp_path: Path, text: str | None, others: int) -> None:
    file = tmp_path / "loadavg"
    if text is not None:
        file.write_text(text)
    assert _others_running(file, pause=0) == others


def test_threads_sleep_where_others_run_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "as it was")  # so that it is put back, whatever it was
    for others, policy in ((0, None), (os.cpu_count(), "PASSIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setattr("veneer.cli.__main__._others_running", lambda others=others: others)
        _wait_politely()
        assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    _wait_politely()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
