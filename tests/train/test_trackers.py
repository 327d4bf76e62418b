"""Dashboards get what metrics.jsonl gets, and no training depends on them."""

from __future__ import annotations

import importlib.util
import json
import struct
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from veneer.config import RunConfig
from veneer.errors import ConfigError
from veneer.train import run, trackers
from veneer.train.trackers import TRACKERS, Opening, Tracking


class Recording:
    """A dashboard that remembers."""

    made: list[Recording]

    def __init__(self, opening: Opening) -> None:
        self.opening, self.points, self.closed = opening, [], []
        self.made.append(self)

    def log(self, values: Any, step: int) -> None:
        self.points.append((step, dict(values)))

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """The trackers opened, in order; wandb's place is taken."""
    Recording.made = []
    monkeypatch.setitem(TRACKERS, "wandb", (("json",), Recording))
    return Recording.made


def _metrics(config: RunConfig) -> list[dict]:
    return [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]


def _expected(lines: list[dict]) -> list[tuple[int, dict]]:
    bare = ("split", "step", "job")
    return [(line["step"], {f"{line['split']}/{k}": v for k, v in line.items() if k not in bare}) for line in lines]


def test_it_gets_what_the_file_gets(config: Any, made: list[Recording]) -> None:
    one = config(report_to="wandb", run_name="first", project_name="digits", logging_steps=2)
    run.train(one, progress=False)
    [tracker] = made
    assert tracker.points == _expected(_metrics(one))
    assert len(tracker.points) == 6 + 4
    assert tracker.closed == [False]
    opening = tracker.opening
    assert (opening.name, opening.project, opening.step, opening.config) == ("first", "digits", 0, one.to_flat())


def test_a_resumed_run_is_the_same_one_there(config: Any, made: list[Recording], stopping: Any) -> None:
    one = config(report_to="wandb")
    stopping(one, 7)
    run.train(one, progress=False, resume=True)
    run.train(one, progress=False)  # another run: the earlier one is set aside
    cut, resumed, other = made
    assert (cut.closed, resumed.closed) == ([True], [False])
    assert resumed.opening.step == 6
    assert [step for step, values in resumed.points if "train/loss" in values] == list(range(7, 13))
    assert (cut.opening.identity, cut.opening.name) == (resumed.opening.identity, resumed.opening.name)
    assert other.opening.identity != resumed.opening.identity


def test_one_that_fails_does_not_end_the_training(config: Any, made: list[Recording]) -> None:
    def broken(values: Any, step: int) -> None:
        raise OSError("no route")

    class Broken(Recording):
        def log(self, values: Any, step: int) -> None:
            super().log(values, step)
            if step == 3:
                raise OSError("no route")

    TRACKERS["wandb"] = (("json",), Broken)  # `made` puts the real one back
    one = config(report_to="wandb")
    with pytest.warns(UserWarning, match=r"wandb is told nothing more of this run \(OSError: no route\)") as told:
        result = run.train(one, progress=False)
    assert result.steps == 12
    assert len([warning for warning in told if "wandb" in str(warning.message)]) == 1
    assert [step for step, _ in made[0].points] == [0, 1, 2, 3]
    assert [line["step"] for line in _metrics(one)][-1] == 12


def test_one_that_cannot_be_opened_ends_the_run_before_its_first_step(
    config: Any, made: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(opening: Opening) -> Any:
        raise PermissionError("not logged in")

    monkeypatch.setitem(TRACKERS, "trackio", (("json",), refused))
    one = config(report_to="wandb,trackio")
    with pytest.raises(ConfigError, match="trackio could not be started: PermissionError: not logged in"):
        run.train(one, progress=False)
    assert not Path(one.output_dir, "metrics.jsonl").exists()
    assert made[0].closed == [True]


def test_a_missing_package_is_named_before_the_model_is_read(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        run.train(config(report_to="tensorboard,wandb", base_model="no/such"), progress=False)
    assert "tensorboard needs a package that is not installed: pip install tensorboard or tensorboardX" in str(
        caught.value
    )
    assert "wandb needs" in str(caught.value)


def test_what_may_be_given(config: Any) -> None:
    assert config(report_to="none").reporting.report_to == []
    assert config(report_to=["wandb", "trackio"]).reporting.report_to == ["wandb", "trackio"]
    with pytest.raises(ConfigError, match="report_to"):
        config(report_to="mlflow")


def test_other_processes_open_nothing(config: Any, made: list[Recording]) -> None:
    one = config(report_to="wandb")
    with Tracking(one, active=False) as tracking:
        tracking.log({"step": 1, "split": "train", "loss": 1.0})
    assert made == []


def test_a_loss_that_is_no_number_is_not_sent(config: Any, made: list[Recording]) -> None:
    Path(config().output_dir).mkdir()
    with Tracking(config(report_to="wandb")) as tracking:
        tracking.log({"step": 1, "split": "eval", "loss": None, "targets": 3})
    assert made[0].points == [(1, {"eval/targets": 3})]


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="needs tensorboardX")
def test_tensorboard_event_files(config: Any) -> None:
    one = config(report_to="tensorboard", run_name="digits")
    run.train(one, progress=False)
    [file] = Path(one.output_dir, "runs", "digits").iterdir()
    points = {(event.step, value.tag): value for event in _events(file) for value in event.summary.value}
    for step, values in _expected(_metrics(one)):
        for name, number in values.items():
            assert points[step, name].simple_value == pytest.approx(number, rel=1e-6)
    assert '"r": 4' in points[0, "options/text_summary"].tensor.string_val[0].decode()


def _events(file: Path) -> Iterator[Any]:
    """The records of an event file: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    held = file.read_bytes()
    while held:
        (length,) = struct.unpack("<Q", held[:8])
        yield Event.FromString(held[12 : 12 + length])
        held = held[16 + length :]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_the_services_are_called_with(
    name: str, config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against stand-ins with the packages' own signatures (wandb 0.31, trackio 0.43)."""
    calls: list[Any] = []

    class Run:
        def log(self, values: dict, step: int | None = None) -> None:
            calls.append(("log", values, step))

        def finish(self, **given: Any) -> None:
            calls.append(("finish", given))

    def init(*, project: str, name: str, config: dict, resume: str, **more: Any) -> Run:
        calls.append(("init", project, name, config["r"], resume, more))
        return Run()

    monkeypatch.setitem(__import__("sys").modules, name, types.SimpleNamespace(init=init))  # type: ignore[arg-type]
    tracker = TRACKERS[name][1](Opening(tmp_path, "p", "n", "id", {"r": 4}, 0))
    tracker.log({"train/loss": 1.0}, 3)
    tracker.close(failed=True)
    more = {"dir": str(tmp_path), "id": "id"} if name == "wandb" else {}
    ended = {"exit_code": 1} if name == "wandb" else {}
    wanted = [("init", "p", "n", 4, "allow", more), ("log", {"train/loss": 1.0}, 3), ("finish", ended)]
    assert calls == wanted
