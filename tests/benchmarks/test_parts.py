"""Parts cover the whole, each on a GPU in turns; one that hangs or fails is told and ended."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.parts import commands, ended, last_words, variables


def test_every_part_once_with_an_output_of_its_own() -> None:
    outputs = [Path(f"p{n}.json") for n in range(3)]
    words = commands("merge_starts", Path("ad"), outputs, 100.0)
    assert [one[one.index("--part") + 1] for one in words] == ["1/3", "2/3", "3/3"]
    assert [one[-1] for one in words] == ["p0.json", "p1.json", "p2.json"]
    assert all(one[:4] == ["-m", "benchmarks.merge_starts", "--adapters", "ad"] for one in words)
    assert not any("--seconds" in one for one in words)
    [timed] = commands("merge_quality", Path("ad"), outputs[:1], 100.0)
    assert timed[timed.index("--seconds") + 1] == "100"
    assert "--seconds" not in commands("merge_quality", Path("ad"), outputs, float("inf"))[0]


def test_gpus_in_turns_and_none_where_there_is_none() -> None:
    assert [variables(n, 2, 4)["CUDA_VISIBLE_DEVICES"] for n in range(4)] == ["0", "1", "0", "1"]
    assert "OMP_NUM_THREADS" in variables(0, 0, 4)


def test_what_hangs_or_fails_is_told() -> None:
    def started(code: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code])

    assert ended(started("pass"), float("inf"))
    assert not ended(started("raise SystemExit(3)"), float("inf"))
    hanging = started("import time; time.sleep(600)")
    assert not ended(hanging, time.monotonic())
    assert hanging.poll() is not None


def test_last_words(tmp_path: Path) -> None:
    (tmp_path / "p.log").write_text("begun\nKeyError: 'base'\n")
    assert last_words(tmp_path / "p.json") == "KeyError: 'base'"
