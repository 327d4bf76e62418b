"""Checkpoints: folders of safetensors and JSON, written whole or not at all, for exact resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from veneer.adapter.files import sync
from veneer.errors import CheckpointError, listed
from veneer.train.job import Job

FOLDER = "checkpoints"
FORMAT = 3  # 2 had the parameters in another order


def save(output_dir: Path, jobs: Sequence[Job], identity: dict[str, Any], keep: int | None, processes: int = 1) -> Path:
    """Writes checkpoints/step-N, N the furthest job's step, then drops all but the last `keep`."""
    folder = output_dir / FOLDER / f"step-{max(job.step for job in jobs):06d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    numbers = {}
    for index, job in enumerate(jobs):
        tensors, numbers[job.slot] = job.state()
        save_file(
            {name: value.contiguous().cpu() for name, value in tensors.items()}, partial / f"job-{index}.safetensors"
        )
    state = {"format": FORMAT, "layout": _layout(jobs, processes), "run": identity, "jobs": numbers}
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    for path in (*partial.iterdir(), partial):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)
    _prune(output_dir, keep)
    return folder


def latest(output_dir: Path) -> Path | None:
    """The last complete checkpoint of a run."""
    folders = _folders(output_dir)
    return folders[-1] if folders else None


def restore(
    folder: Path,
    jobs: Sequence[Job],
    identity: dict[str, Any],
    processes: int = 1,
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """Puts the jobs where the checkpoint left them; returns notes. Raises CheckpointError when it is another run's.

    defaults: of options that a checkpoint of an older version may not know.
    """
    state = _read_state(folder)
    faults = _differences({**{n: v for n, v in (defaults or {}).items() if n in identity}, **state["run"]}, identity)
    missing = [job.slot for job in jobs if job.slot not in state["jobs"]]
    faults += [f"no state for {slot!r}" for slot in missing]
    if faults:
        raise CheckpointError(
            listed(
                f"{folder} belongs to another run:",
                faults,
                "Resume with the settings of its run.yaml, or train into another --output-dir.",
            )
        )
    for index, job in enumerate(jobs):
        job.restore(_read_tensors(folder / f"job-{index}.safetensors"), state["jobs"][job.slot])
    before, now = state["layout"], _layout(jobs, processes)
    changes = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    dropping = any(method.dropout for job in jobs for method in job.methods.values())
    masks = ", and dropout draws other masks" if dropping else ""
    return [f"{'; '.join(changes)}: equal up to rounding, not to the byte{masks}"] if changes else []


def _layout(jobs: Sequence[Job], processes: int) -> dict[str, Any]:
    """How the work of a step is cut up: it decides the order of sums, and so the last bits of them."""
    passes = [job.settings.per_device_train_batch_size for job in jobs]
    return {"threads": torch.get_num_threads(), "processes": processes, "rows in a forward pass": passes}


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); delete it to resume from the one before") from error
    wanted = {"run": dict, "jobs": dict, "layout": dict}
    if not isinstance(state, dict) or any(not isinstance(state.get(name), kind) for name, kind in wanted.items()):
        raise CheckpointError(
            f"{folder}/state.json is no training state; delete the folder to resume from the one before"
        )
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} is a checkpoint of format {state.get('format')}, this veneer reads {FORMAT}; next: train again "
            "into another --output-dir, or resume with the veneer that wrote it"
        )
    return state


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); delete {file.parent} to resume from the one before"
        ) from error


def _differences(recorded: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    names = sorted(recorded.keys() | wanted.keys())
    return [
        f"{n}: it has {recorded.get(n)!r}, this run {wanted.get(n)!r}"
        for n in names
        if recorded.get(n) != wanted.get(n)
    ]


def _folders(output_dir: Path) -> list[Path]:
    return sorted(path for path in (output_dir / FOLDER).glob("step-*") if (path / "state.json").is_file())


def _prune(output_dir: Path, keep: int | None) -> None:
    stale = _folders(output_dir)[:-keep] if keep else []
    for folder in [*stale, *(output_dir / FOLDER).glob(".step-*.partial")]:  # a kill while saving leaves a partial one
        shutil.rmtree(folder)
