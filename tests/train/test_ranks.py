"""Several processes train one adapter: the same steps as one process takes, whole base or shared out."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.adapter.card import Adapter
from veneer.bases import BASES
from veneer.config import RunConfig
from veneer.errors import ConfigError
from veneer.train import run
from veneer.train.ranks import ALONE, Ranks, joined

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "adapter_model.safetensors"


def half_of(finished: Path, half: Path) -> None:
    """What was there of a run of 10 steps when it had come to step 5."""
    shutil.copytree(finished, half)
    shutil.rmtree(half / "checkpoints" / "step-000010")
    (half / "adapter_model.safetensors").unlink()


# Trains configuration after configuration in one group of processes: starting Python is most of the time.
TRAIN = f"""
import json, shutil, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from veneer.config import RunConfig
from veneer.train.dry_run import dry_run
from veneer.train.ranks import joined
from veneer.train.run import train
{inspect.getsource(half_of)}
results = []
with joined() as ranks:
    for options, goes_on in json.loads(sys.argv[1]):
        if goes_on and ranks.is_main:
            half_of(Path(goes_on), Path(options["output_dir"]))
        ranks.barrier()
        results.append(train(RunConfig.from_flat(options), resume=bool(goes_on), progress=False).to_json())
    dry = dry_run(RunConfig.from_flat(json.loads(sys.argv[1])[0][0]))
if ranks.is_main:
    print(json.dumps([*results, dry]))
"""
# An uneven share (5 rows: 3 and 2), two passes a step, a short last step in the epoch, validation.
COMMON = {
    "max_steps": 10,
    "r": 4,
    "dtype": "float32",
    "learning_rate": 1e-2,
    "eval_steps": 4,
    "save_steps": 5,
    "save_total_limit": "none",
    "per_device_train_batch_size": 5,
    "gradient_accumulation_steps": 2,
}
STORAGES = {
    "nf4": {"load_in_4bit": True},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int4": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
    "int8": {"load_in_8bit": True},
}
TRACKED = {"report_to": "tensorboard"} if importlib.util.find_spec("tensorboardX") else {}
EARLIER = "an adapter that the fixture trains"
SHARDED = {"fsdp": True, "max_steps": 3}
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "resumed": {},
    "few rows": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 4} | TRACKED,
    "float16": {"dtype": "float16", "max_steps": 4},
    "orthogonal": {"orthogonal_to": EARLIER, "orthogonal_lambda": 3, "max_steps": 4},
    "sharded, orthogonal": {**SHARDED, "orthogonal_to": EARLIER, "orthogonal_lambda": 3, "orthogonal_start": False},
    "sharded": SHARDED,
    "sharded, few rows": {**SHARDED, "per_device_train_batch_size": 1},
    "sharded, recomputed": {**SHARDED, "gradient_checkpointing": True},
    "sharded, by delta": {**SHARDED, "lora_dropout": 1e-7},
    **{f"sharded {name}": {**SHARDED, **options} for name, options in STORAGES.items() if name in BASES},
}

Options = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def options(pico_folder: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """options(case, who): flat options of a case, into a folder of its own."""
    home = tmp_path_factory.mktemp("ranks")
    files = {"base_model": str(pico_folder), "dataset": str(digits)}
    earlier = {**files, **COMMON, "output_dir": str(home / "earlier"), "seed": 1, "max_steps": 2}
    run.train(RunConfig.from_flat(earlier), progress=False)

    def make(case: str, who: str) -> dict[str, Any]:
        output = home / who / case.replace(" ", "-")
        asked = {**files, "output_dir": str(output), **COMMON, **CASES[case]}
        return {name: earlier["output_dir"] if value is EARLIER else value for name, value in asked.items()}

    return make


def _start(script: list[str], rank: int, port: int, gpus: bool) -> subprocess.Popen:
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings |= {"OMP_NUM_THREADS": 1} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    env = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    return subprocess.Popen(
        [sys.executable, *script], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _pair(*scripts: list[str], seconds: float = 240, gpus: bool = False) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of two processes that run together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_start(script, rank, port, gpus) for rank, script in enumerate(scripts)]
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def together(options: Options) -> dict[str, dict[str, Any]]:
    """Case -> what the first of two processes says of the run; "resumed" goes on from the middle of "whole"."""
    whole = options("whole", "two")["output_dir"]
    runs = [(options(case, "two"), whole if case == "resumed" else None) for case in CASES]
    [main, other] = _pair(*[["-c", TRAIN, json.dumps(runs)]] * 2)
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    assert other[1] == ""
    return dict(zip([*CASES, "dry run"], json.loads(main[1]), strict=True))


def _losses(folder: str) -> list[tuple[int, str, float, int]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line["loss"], line["targets"]) for line in lines]


def _flat(folder: str) -> torch.Tensor:
    adapter = Adapter.load(folder)
    return torch.cat([factor.reshape(-1) for path in adapter.modules() for factor in adapter.factors(path)])


@pytest.mark.parametrize("case", [case for case in CASES if case != "resumed"])
def test_two_processes_take_the_steps_of_one(case: str, options: Options, together: Any) -> None:
    two, one = options(case, "two"), options(case, "one") | {"fsdp": False}
    alone = run.train(RunConfig.from_flat(one), progress=False)
    ours, theirs = _losses(two["output_dir"]), _losses(one["output_dir"])
    assert [(step, split, targets) for step, split, _, targets in ours] == [
        (step, split, targets) for step, split, _, targets in theirs
    ]
    # Sums over rows in another order, and products of other sizes: rounding to 24 bits or 11, fed back by training.
    close = 2e-2 if case == "float16" else 2e-5
    assert [loss for _, _, loss, _ in ours] == pytest.approx([loss for _, _, loss, _ in theirs], rel=close)
    difference = torch.linalg.vector_norm(_flat(two["output_dir"]) - _flat(one["output_dir"]))
    assert difference < 50 * close * torch.linalg.vector_norm(_flat(one["output_dir"]))
    told = together[case]
    assert (told["tokens"], told["steps"], told["best_step"]) == (alone.tokens, alone.steps, alone.best_step)
    ours, theirs = (Adapter.load(each["output_dir"]).card.training["update_norms"] for each in (two, one))
    assert ours == pytest.approx(theirs, rel=max(1e-2, 50 * close))


def test_a_dry_run_of_two_processes_counts_as_their_run_does(together: Any) -> None:
    dry, whole = together["dry run"], together["whole"]
    for name in ("steps", "trainable_parameters", "learning_rate"):
        assert dry[name] == whole[name]
    assert dry["tokens_of_the_run"] == whole["tokens"]


@pytest.mark.skipif(not TRACKED, reason="needs tensorboardX")
def test_one_process_of_two_speaks_to_a_dashboard(options: Options, together: Any) -> None:
    runs = Path(options("few rows", "two")["output_dir"], "runs")
    assert len([file for file in runs.rglob("*tfevents*") if file.is_file()]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype, close", [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("case", ["whole", "sharded", "sharded, recomputed", "sharded nf4-dq"])
def test_two_gpus_take_the_steps_of_one(case: str, dtype: str, close: float, options: Options) -> None:
    """Through NCCL. Products of other sizes are rounded otherwise, and training feeds that back."""
    two, one = ({**options(case, f"{who}-gpus-{dtype}"), "dtype": dtype} for who in ("two", "one"))
    [main, other] = _pair(*[["-c", TRAIN, json.dumps([(two, None)])]] * 2, gpus=True)
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    run.train(RunConfig.from_flat({**one, "fsdp": False}), progress=False)
    ours, theirs = _losses(two["output_dir"]), _losses(one["output_dir"])
    assert [loss for _, _, loss, _ in ours] == pytest.approx([loss for _, _, loss, _ in theirs], rel=close)


def test_two_processes_resume_to_the_same_bytes(options: Options, together: Any) -> None:
    folders = [Path(options(case, "two")["output_dir"]) for case in ("whole", "resumed")]
    whole, resumed = [(folder / WEIGHTS).read_bytes() for folder in folders]
    assert whole == resumed
    assert any("resumed from" in note for note in together["resumed"]["notes"])
    assert _losses(str(folders[0])) == _losses(str(folders[1]))


def test_one_process_goes_on_where_two_were(options: Options, together: Any) -> None:
    two, one = options("whole", "two"), options("resumed", "one")
    half_of(Path(two["output_dir"]), Path(one["output_dir"]))
    result = run.train(RunConfig.from_flat(one), progress=False, resume=True)
    assert any("processes was 2, is 1" in note and "rounding" in note for note in result.notes)
    difference = torch.linalg.vector_norm(_flat(two["output_dir"]) - _flat(one["output_dir"]))
    assert 0 <= difference < 1e-3 * torch.linalg.vector_norm(_flat(two["output_dir"]))


def test_what_is_shared_is_said(together: Any) -> None:
    notes = "\n".join(together["few rows"]["notes"])
    assert "2 processes share each forward pass of 1 rows" in notes
    assert "1 of them have no rows" in notes


def test_rows_are_shared_once() -> None:
    for world in (1, 2, 3):
        shares = [Ranks(rank, world).share(list(range(7))) for rank in range(world)]
        assert sorted(row for share in shares for row in share) == list(range(7))


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks == ALONE
        assert ranks.is_main
        ranks.barrier()
    assert ranks.sum_(torch.ones(2)).tolist() == [1.0, 1.0]


def test_one_process_has_nobody_to_share_the_base_with(options: Options) -> None:
    with pytest.raises(ConfigError, match=r"--fsdp .*torchrun --nproc-per-node"):
        run.train(RunConfig.from_flat(options("sharded", "one")), progress=False)


# The second process fails in its third step; the first waits for it in a sum.
FAILING = """
import os, sys
import veneer.train.objective as objective
from veneer.cli.__main__ import main
before, seen = objective.cross_entropy, []
def failing(*given):
    seen.append(1)
    if os.environ["RANK"] == "1" and len(seen) == 3:
        raise MemoryError("no room")
    return before(*given)
objective.cross_entropy = failing
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_fails_ends_the_run(options: Options, tmp_path: Path) -> None:
    given = {**options("whole", "two"), "output_dir": str(tmp_path / "out")}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    script = ["-c", FAILING, "train", *words, "--no-progress"]
    [main, other] = _pair(script, script)
    assert (main[0], other[0]) == (2, 2), main[2]
    assert "process 1 of 2: out of memory: no room" in main[2]
    assert "out of memory" not in other[2], "told twice"
    assert not Path(given["output_dir"], WEIGHTS).exists()


# Three groups of processes, one after the other, each ended by a failure.
ENDING = """
import json, os, torch
import torch.distributed as dist
from veneer.errors import DataError, TrainingError
from veneer.train.ranks import joined
kept, rendezvous = [], dist.rendezvous
def keeping(url):
    # The first process keeps the store that the other asks for a moment more; under torchrun, torchrun does.
    kept.append(next(rendezvous(url)))
    yield kept[-1]
dist.rendezvous = keeping
port = int(os.environ["MASTER_PORT"])
def both(rank): raise DataError("no file")
def bug(rank): return rank == 1 and {}["a bug"]
def killed(rank): return rank == 1 and os.kill(os.getpid(), 9)
for number, fail in enumerate((both, bug, killed)):
    os.environ["MASTER_PORT"] = str(port + number)
    try:
        with joined() as ranks:
            fail(ranks.rank)
            ranks.sum_(torch.ones(1))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error), getattr(error, "told_elsewhere", None)]), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_how_a_failure_reaches_the_others() -> None:
    [main, other] = _pair(["-c", ENDING], ["-c", ENDING])
    told = [[json.loads(line) for line in said.splitlines()] for _, said, _ in (main, other)]
    assert (main[0], other[0]) == (0, -signal.SIGKILL), main[2] + other[2]
    assert told[1] == [["DataError", "no file", True], ["KeyError", "'a bug'", None]]
    both, bug, killed = told[0]
    assert both == ["DataError", "no file", False]
    assert bug == ["TrainingError", "process 1 of 2: KeyError: 'a bug'", False]
    assert killed[0] == "TrainingError" and "ended without a word" in killed[1]
