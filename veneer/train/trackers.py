"""Dashboards that a run's metrics also go to, the table TRACKERS: the numbers of metrics.jsonl under its names.

Training never depends on them: a package that is missing, or a service that cannot be reached, is an error before the
first step; whatever fails after it is told once, and the run goes on without that tracker.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from veneer.config import RunConfig
from veneer.errors import ConfigError, listed
from veneer.notes import tell

IDENTITY = "tracker.json"  # what a resumed run is known by
Values = Mapping[str, float]


class Tracker(Protocol):
    """One dashboard, in which a run has been opened."""

    def log(self, values: Values, step: int) -> None:
        """Notes these numbers, which are of optimiser step `step`."""

    def close(self, failed: bool) -> None:
        """Ends the run there; `failed`: by an error."""


class Opening(NamedTuple):
    """What a tracker is told of the run."""

    folder: Path  # the run's own
    project: str
    name: str
    identity: str  # the same after a resume
    config: dict[str, Any]
    step: int  # optimiser steps taken before


class TensorBoard:
    """Event files in `output_dir`/runs."""

    def __init__(self, run: Opening) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            from tensorboardX import SummaryWriter
        # Of points beyond the checkpoint that a resumed run goes on from, those that it writes anew are shown.
        purged = {"purge_step": run.step + 1} if run.step else {}
        self.writer = SummaryWriter(str(run.folder / "runs" / run.name), **purged)
        self.writer.add_text("options", "```\n" + json.dumps(run.config, indent=1) + "\n```", run.step)

    def log(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; steps of a resumed run that are there already are left as they are: they are equal."""

    def __init__(self, run: Opening) -> None:
        import wandb

        given = {"project": run.project, "name": run.name, "config": run.config, "dir": str(run.folder)}
        self.run = wandb.init(**given, id=run.identity, resume="allow")

    def log(self, values: Values, step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio:
    """trackio, which knows a run by its name."""

    def __init__(self, run: Opening) -> None:
        import trackio

        self.run = trackio.init(project=run.project, name=run.name, config=run.config, resume="allow")

    def log(self, values: Values, step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()


# name -> (packages of which one is needed, how a run is opened); the names are the values of the option `report_to`
TRACKERS: dict[str, tuple[tuple[str, ...], Callable[[Opening], Tracker]]] = {
    "tensorboard": (("tensorboard", "tensorboardX"), TensorBoard),
    "wandb": (("wandb",), WandB),
    "trackio": (("trackio",), Trackio),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError where packages are missing."""
    faults = []
    for name in names:
        packages = TRACKERS[name][0]
        if not any(importlib.util.find_spec(package) for package in packages):
            faults.append(f"{name} needs a package that is not installed: pip install {' or '.join(packages)}")
    if faults:
        raise ConfigError(listed("--report-to:", faults, "Or leave it out: metrics.jsonl and report.html are written."))


class Tracking:
    """The trackers of a run; `with` closes them, on failure too. Without names it does nothing."""

    def __init__(self, config: RunConfig, step: int = 0, active: bool = True) -> None:
        """step: optimiser steps taken before. active: of several processes, one. Raises ConfigError where a tracker
        cannot be opened."""
        self.open: dict[str, Tracker] = {}
        names = config.reporting.report_to if active else []
        try:
            for name in names:
                self.open[name] = _opened(name, _opening(config, step))
        except ConfigError:
            self.close(failed=True)
            raise

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_unused: object) -> None:
        self.close(failed=kind is not None)

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: its numbers, as `split/name`."""
        told = ("step", "split", "job")
        values = {f"{line['split']}/{name}": value for name, value in line.items() if name not in told}
        self._each(lambda tracker: tracker.log({k: v for k, v in values.items() if v is not None}, line["step"]))

    def close(self, failed: bool) -> None:
        """Ends the run in every tracker."""
        self._each(lambda tracker: tracker.close(failed))
        self.open.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever it is, the training is worth more
                del self.open[name]
                tell(
                    f"{name} is told nothing more of this run ({type(error).__name__}: {error}); training goes on, and "
                    "metrics.jsonl has everything"
                )


def _opened(name: str, run: Opening) -> Tracker:
    try:
        return TRACKERS[name][1](run)
    except Exception as error:  # libraries and services of others: anything may come
        raise ConfigError(
            f"--report-to {name} could not be started: {type(error).__name__}: {error}; next: mend that (logged in? a "
            "network?), or leave it out"
        ) from error


def _opening(config: RunConfig, step: int) -> Opening:
    folder, reporting = Path(config.output_dir), config.reporting
    identity = _identity(folder / IDENTITY)
    name = reporting.run_name or f"{folder.resolve().name}-{identity[:6]}"
    return Opening(folder, reporting.project_name, name, identity, config.to_flat(), step)


def _identity(file: Path) -> str:
    """Made with the run's folder: a resumed run goes on in the dashboard, another run there is another one."""
    if not file.is_file():
        file.write_text(json.dumps({"id": secrets.token_hex(8)}) + "\n")
    return str(json.loads(file.read_text())["id"])
