"""Checkpoints: whole or not at all, and only for the run that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.errors import CheckpointError
from veneer.train import checkpoint

RUN = {"r": 4, "seed": 0}


@pytest.fixture
def jobs(pico: Any, job: Any, examples: Any, run_loop: Any) -> list:
    """Two jobs that have come different ways."""
    one = job(pico, "one", examples(8), examples(4), max_steps=4, eval_steps=2)
    two = job(pico, "two", examples(6, 1), max_steps=7, lora={"r": 2})
    run_loop(pico, one, two)
    return [one, two]


@pytest.fixture
def fresh(jobs: list, pico: Any, job: Any, examples: Any) -> list:
    """The same jobs at their start, under the same names."""
    from veneer.adapter.attach import detach

    for name in ("one", "two"):
        detach(pico, name)
    one = job(pico, "one", examples(8), examples(4), max_steps=4, eval_steps=2)
    return [one, job(pico, "two", examples(6, 1), max_steps=7, lora={"r": 2})]


def test_all_jobs_come_back_to_the_bit(jobs: list, fresh: list, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, jobs, RUN, keep=2)
    assert folder.name == "step-000007"
    assert checkpoint.restore(folder, fresh, RUN) == []
    for before, after in zip(jobs, fresh, strict=True):
        (tensors, numbers), (tensors_after, numbers_after) = before.state(), after.state()
        assert numbers == numbers_after
        assert all(torch.equal(tensors[name], tensors_after[name]) for name in tensors)


def test_another_format_is_refused(jobs: list, fresh: list, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, jobs, RUN, keep=2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": checkpoint.FORMAT - 1}))
    before = fresh[0].flat.values_P.detach().clone()
    with pytest.raises(CheckpointError, match=f"format {checkpoint.FORMAT - 1}, this veneer reads {checkpoint.FORMAT}"):
        checkpoint.restore(folder, fresh, RUN)
    assert torch.equal(fresh[0].flat.values_P, before)


def test_the_last_ones_are_kept(jobs: list, tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        for job in jobs:
            job.step = step
        checkpoint.save(tmp_path, jobs, RUN, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000010", "step-000011"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-000011"
    jobs[0].step = 12
    checkpoint.save(tmp_path, jobs, RUN, keep=None)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None


def test_a_save_that_fails_leaves_the_one_before(jobs: list, tmp_path: Path, monkeypatch: Any) -> None:
    first = checkpoint.save(tmp_path, jobs, RUN, keep=1)
    before = {file.name: file.read_bytes() for file in first.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    jobs[1].step = 8
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, jobs, RUN, keep=1)
    assert checkpoint.latest(tmp_path) == first
    assert {file.name: file.read_bytes() for file in first.iterdir()} == before


def test_another_run_is_refused_with_every_difference(jobs: list, fresh: list, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, jobs[:1], RUN, keep=1)
    values = fresh[0].flat.values_P.detach().clone()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(folder, fresh, {"r": 8, "seed": 0, "data_sha256": "ab"})
    message = str(caught.value)
    for part in ("r: it has 4, this run 8", "data_sha256: it has None, this run 'ab'", "'two'", "run.yaml"):
        assert part in message
    assert "seed" not in message
    assert torch.equal(fresh[0].flat.values_P, values)


@pytest.mark.parametrize("name", ["job-0.safetensors", "job-1.safetensors", "state.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_truncated_file_is_told(jobs: list, fresh: list, tmp_path: Path, name: str, share: float) -> None:
    folder = checkpoint.save(tmp_path, jobs, RUN, keep=1)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read|{folder.name} cannot be read"):
        checkpoint.restore(folder, fresh, RUN)


@pytest.mark.parametrize("text", ["{}", "[]"])
def test_a_state_of_another_shape_is_told(jobs: list, fresh: list, tmp_path: Path, text: str) -> None:
    folder = checkpoint.save(tmp_path, jobs, RUN, keep=1)
    (folder / "state.json").write_text(text)
    with pytest.raises(CheckpointError):
        checkpoint.restore(folder, fresh, RUN)


def test_a_missing_file_is_told(jobs: list, fresh: list, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, jobs, RUN, keep=1)
    (folder / "job-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"job-1.safetensors cannot be read.*delete"):
        checkpoint.restore(folder, fresh, RUN)


def test_other_threads_are_a_note(jobs: list, fresh: list, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, jobs, RUN, keep=1)
    state = json.loads((folder / "state.json").read_text())
    state["layout"]["threads"] += 1
    (folder / "state.json").write_text(json.dumps(state))
    (note,) = checkpoint.restore(folder, fresh, RUN)
    assert "threads was" in note
    assert "not to the byte" in note


def test_other_processes_and_passes_are_a_note(jobs: list, fresh: list, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, jobs, RUN, keep=1, processes=2)
    (note,) = checkpoint.restore(folder, fresh, RUN, processes=4)
    assert "processes was 2, is 4" in note
    assert "dropout" not in note
