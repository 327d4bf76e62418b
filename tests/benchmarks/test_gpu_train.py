"""The driver: several calls fill one file, a child's end of any kind is a result, the longest sequence is found."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_process, gpu_train, record
from benchmarks.gpu_child import MARK, out_of_memory
from benchmarks.gpu_longest import confirmed, longest
from benchmarks.gpu_rows import ROWS
from benchmarks.gpu_spec import Spec, sizes
from benchmarks.gpu_sweep import SCAN_STEPS, Clock
from benchmarks.gpu_table import table


def result(speed: float, peak: float = 20.0) -> dict[str, Any]:
    memory = {"peak_gib": peak, "driver_gib": peak + 1, "idle_gib": 15.0}
    return {"tokens_per_second": speed, "losses": [12.0], "process_seconds": 1.0, **memory}


def measured(held: dict[str, Any], name: str, speeds: dict[str, float], **changes: Any) -> list[Spec]:
    """One call of the driver over a fake device; a speed of 0 is out of memory."""
    seen: list[Spec] = []

    def run(spec: Spec) -> dict[str, Any]:
        seen.append(spec)
        speed = speeds[spec.system]
        return {
            **(result(speed * spec.batch) if speed else {"oom": "CUDA out of memory"}),
            "variant": spec.variant,
            "spec": spec.__dict__,
        }

    options = argparse.Namespace(**{"systems": list(speeds), "reuse": False, "rounds": 2, "steps": 9} | changes)
    gpu_train.measure(held, name, options, Clock(None), lambda: None, run)
    return seen


@pytest.fixture(autouse=True)
def no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_train, "_checkpoint", lambda shape: None)


def test_calls_fill_one_file_and_each_part_tells_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_COMMIT", "abc-dirty")
    path = tmp_path / "gpu_train.json"
    held = gpu_train.load(path)
    measured(held, "8b-bf16", {"ours": 100, "unsloth": 90})
    gpu_train.saver(held, path)()
    monkeypatch.setenv("VENEER_COMMIT", "def")
    held = gpu_train.load(path)
    measured(held, "8b-bf16", {"peft": 50})
    measured(held, "65b", {"ours-nf4": 10})
    gpu_train.saver(held, path)()

    saved = json.loads(path.read_text(encoding="utf-8"))
    systems = saved["rows"]["8b-bf16"]["systems"]
    assert saved["commit"] == "def" and saved["dirty"] is False
    assert (systems["ours"]["commit"], systems["ours"]["dirty"], systems["peft"]["commit"]) == ("abc", True, "def")
    assert systems["ours"]["variant"]["batch"] == 3 and systems["ours"]["tokens_per_second"] == 300
    assert saved["rows"]["8b-bf16"]["ratios"]["ours"]["unsloth"]["tokens_per_second"]["median"] == pytest.approx(10 / 9)
    assert "65b" in saved["rows"]
    assert "unsloth" in table("8b-bf16", saved["rows"]["8b-bf16"])


def test_files_of_several_gpus_become_one() -> None:
    one: dict[str, Any] = {}
    other: dict[str, Any] = {"longest": {"8b-longest": {"limits": {}}}}
    measured(one, "8b-bf16", {"ours": 100, "unsloth": 90})
    measured(other, "8b-bf16", {"ours": 100, "peft": 50})
    measured(other, "65b", {"ours-nf4": 10})
    held: dict[str, Any] = {}
    tried: dict[str, Any] = {}
    measured(tried, "8b-bf16", {"ours": 0})
    gpu_train.gather(held, [one, other, tried])
    assert held["rows"]["8b-bf16"]["systems"]["ours"]["tokens_per_second"] == 300
    assert set(held["rows"]["8b-bf16"]["systems"]) == {"ours", "unsloth", "peft"}
    assert set(held["rows"]["8b-bf16"]["ratios"]["ours"]) == {"unsloth", "peft"}
    assert "65b" in held["rows"] and "longest" in held


def test_what_was_measured_is_not_replaced_by_what_was_only_tried() -> None:
    held: dict[str, Any] = {}
    measured(held, "8b-bf16", {"ours": 100})
    measured(held, "8b-bf16", {"ours": 0})
    assert held["rows"]["8b-bf16"]["systems"]["ours"]["tokens_per_second"] == 300


def test_a_system_that_never_fits_leaves_its_trials_and_a_table_without_it() -> None:
    held: dict[str, Any] = {}
    measured(held, "8b-bf16", {"ours": 0, "unsloth": 90})
    systems = held["rows"]["8b-bf16"]["systems"]
    assert len(systems["ours"]["trials"]) == len(ROWS["8b-bf16"].systems["ours"])
    assert all("oom" in made for made in systems["ours"]["trials"])
    assert "| ours |" not in table("8b-bf16", held["rows"]["8b-bf16"])


def test_only_variants_that_were_not_tried_are_tried_again() -> None:
    held: dict[str, Any] = {}
    measured(held, "8b-bf16", {"ours": 100}, rounds=0)
    again = measured(held, "8b-bf16", {"ours": 100}, reuse=True)
    assert [spec.steps for spec in again] == [9, 9]
    held["rows"]["8b-bf16"]["systems"]["ours"]["trials"].pop()
    again = measured(held, "8b-bf16", {"ours": 100}, reuse=True)
    assert [spec.steps for spec in again] == [SCAN_STEPS, 9, 9]


@pytest.mark.parametrize(
    "script, expected",
    [
        (f"print('noise'); print('{MARK}' + '{{\"a\": 1}}')", {"a": 1}),
        ("raise SystemExit('no such kernel')", {"failed": "exit code 1: no such kernel"}),
        ("import os; os._exit(3)", {"failed": "exit code 3: no output"}),
        ("raise SystemExit('no file /a/b-c/d.py here')", {"failed": "exit code 1: no file d.py here"}),
        ("import time; time.sleep(60)", {"failed": "not done after 3 s"}),
    ],
)
def test_a_process_may_end_in_any_way(script: str, expected: dict[str, Any]) -> None:
    got = gpu_process.read(["-c", script], limit=3.0)
    assert expected.items() <= got.items() and "process_seconds" in got


def test_packages_of_peers_are_on_the_path_of_peers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_BENCH_PEERS", "packages")
    monkeypatch.setenv("PYTHONPATH", "here")
    assert gpu_process.environment("unsloth")["PYTHONPATH"].split(":") == ["packages", "here"]
    assert gpu_process.environment("ours-nf4")["PYTHONPATH"] == "here"


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected


def test_a_length_is_predicted_from_a_few_layers_and_confirmed() -> None:
    seen: list[Spec] = []

    def run(spec: Spec) -> dict[str, Any]:
        seen.append(spec)
        layers = sizes(spec.shape)["num_hidden_layers"]
        first, later = 5.0 + 0.4 * layers, 3.0 + 0.5 * layers  # at few layers the first step takes more
        told = {"first_step_peak_gib": first + spec.sequence * 2**-12, "later_peak_gib": later + spec.sequence * 2**-12}
        return told | {"tokens_per_second": 1.0}

    spec = Spec("ours-nf4", "70b", "nf4")
    *_, found = longest(spec, [78.0, 60.0], run, steps=1, most=100_000)
    assert [sizes(each.shape)["num_hidden_layers"] for each in seen] == [2, 2, 4, 80, 80]
    lines = found["lines"]
    assert lines["first_step_peak_gib"] == pytest.approx({"fixed_gib": 5.0, "layer_gib": 0.4, "token_kib": 256.0})
    assert lines["later_peak_gib"] == pytest.approx({"fixed_gib": 3.0, "layer_gib": 0.5, "token_kib": 256.0})
    assert [(made["predicted"], made["sequence"]) for made in found["limits"].values()] == [
        ((77 - 43) * 2**12, 99_840),
        ((59 - 43) * 2**12, (59 - 43) * 2**12),
    ]
    assert [spec.cap_gib for spec in seen[3:]] == [77.0, 59.0] and seen[3].steps == 1
    (found,) = longest(spec, [78.0], lambda _: {"oom": "CUDA out of memory"}, steps=1, most=1)
    assert "limits" not in found


def test_the_longest_counts_only_once_a_fresh_process_trained_at_it() -> None:
    def run(spec: Spec) -> dict[str, Any]:
        return result(1.0) if spec.sequence <= 9700 else {"oom": "CUDA out of memory"}

    made = confirmed(Spec("ours-nf4", "8b"), 16.0, 10240, run)
    assert (made["sequence"], made["cap_gib"]) == (9216, 16.0)
    assert confirmed(Spec("ours-nf4", "8b"), 8.0, 0, run)["sequence"] == 0


def test_nothing_but_a_line_is_printed_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "gpu", lambda: None)
    monkeypatch.setattr("sys.argv", ["gpu_train", "--output", str(tmp_path / "gpu_train.json")])
    gpu_train.main()
    assert capsys.readouterr().out.startswith("skipped") and not list(tmp_path.iterdir())
