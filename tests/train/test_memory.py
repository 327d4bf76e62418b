"""A step that does not fit: what is said, and that the way out works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.adapter.card import Adapter
from veneer.config import RunConfig
from veneer.errors import CheckpointError, NotEnoughMemoryError, VeneerError
from veneer.train import objective, run
from veneer.train.memory import is_out_of_memory

Config = Callable[..., RunConfig]


@pytest.fixture
def filling(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, int], None]:
    """filling(error, n): the n-th forward pass that trains raises the error."""

    def fill(error: Exception, n: int) -> None:
        before, seen = objective.cross_entropy, []

        def cross_entropy(*given: Any) -> Any:
            seen.append(1)
            if len(seen) == n:
                monkeypatch.setattr(objective, "cross_entropy", before)
                raise error
            return before(*given)

        monkeypatch.setattr(objective, "cross_entropy", cross_entropy)

    return fill


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_the_message_says_what_was_held_and_what_to_lower(config: Config, filling: Any) -> None:
    filling(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), 5)
    one = config(per_device_train_batch_size=6, rank_pattern={"q_proj": 2})
    with pytest.raises(NotEnoughMemoryError) as caught:
        run.train(one, progress=False)
    message = str(caught.value)
    assert isinstance(caught.value, VeneerError)
    for part in (
        "Tried to allocate 2.00 GiB.",
        "step 5 of 12",
        "(6 rows, the longest ",
        "rank 2 to 4, recompute auto",
        "--per-device-train-batch-size 3 --gradient-accumulation-steps 2 (now 6 and 1)",
        "--gradient-checkpointing",
        "--load-in-4bit",
        "The last checkpoint stands: --resume",
    ):
        assert part in message
    assert "more" not in message.splitlines()[0]
    assert not Path(one.output_dir, "adapter_model.safetensors").exists()


def test_gradients_are_freed_where_they_are_many(config: Config, filling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.train.memory.MANY", 0)
    filling(torch.OutOfMemoryError("CUDA out of memory"), 2)
    with pytest.raises(NotEnoughMemoryError, match=r"--optimizer-in-bwd --max-grad-norm 0: .*GiB, are freed"):
        run.train(config(), progress=False)
    filling(torch.OutOfMemoryError("CUDA out of memory"), 2)
    with pytest.raises(NotEnoughMemoryError) as caught:
        run.train(config(optimizer_in_bwd=True, max_grad_norm=0), progress=False)
    assert not any(part in str(caught.value) for part in ("--optimizer-in-bwd", "-accumulation-", "--gradient-check"))
    assert "recompute on" in str(caught.value)


def test_what_cannot_be_lowered_is_not_advised(config: Config, filling: Any) -> None:
    filling(MemoryError(), 1)
    with pytest.raises(NotEnoughMemoryError) as caught:
        run.train(config(per_device_train_batch_size=1, gradient_checkpointing=True), progress=False)
    assert "--per-device" not in str(caught.value)
    assert "--gradient-checkpointing" not in str(caught.value)
    assert "recompute on" in str(caught.value)


def test_a_base_in_4_bits_is_not_advised_again_and_more_gpus_are(
    config: Config, filling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    filling(MemoryError(), 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(NotEnoughMemoryError) as caught:
        run.train(config(load_in_4bit=True), progress=False)
    assert "--load-in-4bit" not in str(caught.value)
    assert "torchrun --nproc-per-node 4 -m veneer.cli train" in str(caught.value)


def test_another_runtime_error_is_left_as_it_is(config: Config, filling: Any) -> None:
    filling(RuntimeError("shapes cannot be multiplied"), 1)
    with pytest.raises(RuntimeError, match="shapes"):
        run.train(config(), progress=False)


def test_the_advice_resumes_to_the_same_adapter(config: Config, filling: Any, tmp_path: Path) -> None:
    # 76 rows to train on: the last step of an epoch is a short one, and both ways of cutting must agree on it.
    whole = config(output_dir=str(tmp_path / "whole"), per_device_train_batch_size=16)
    result = run.train(whole, progress=False)
    filling(MemoryError(), 8)
    with pytest.raises(NotEnoughMemoryError):
        run.train(config(per_device_train_batch_size=16), progress=False)
    halved = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    resumed = run.train(config(**halved), progress=False, resume=True)
    assert any("rows in a forward pass was [16], is [8]" in note for note in resumed.notes)
    assert (resumed.tokens, resumed.steps) == (result.tokens, result.steps)
    # a gradient summed in two parts: rounding of float32
    assert resumed.final_loss == pytest.approx(result.final_loss, rel=1e-5)
    ours, theirs = (Adapter.load(folder).tensors for folder in (config().output_dir, whole.output_dir))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_another_number_of_rows_in_a_step_is_another_run(config: Config) -> None:
    run.train(config(max_steps=4, per_device_train_batch_size=8), progress=False)
    more = config(max_steps=4, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    with pytest.raises(CheckpointError, match=r"rows in a step.*it has 8, this run 16"):
        run.train(more, progress=False, resume=True)
