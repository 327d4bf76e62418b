"""The systems do the same work: same weights, same tokens, so the loss of the first step agrees."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ours_gpu, peers_checkpoint
from benchmarks.gpu_model import batch_of, fresh
from benchmarks.gpu_spec import Spec

SPEC = Spec("ours", "pico", rank=4, sequence=48, batch=2, steps=3)


class Told:
    """A meter that keeps what it is told."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.trained = self.marks = 0

    def ready(self, trained: Any, **facts: Any) -> None:
        self.trained = sum(tensor.numel() for tensor in trained)

    def step(self, loss: Any) -> None:
        self.mark()
        self.losses.append(float(loss))

    def mark(self) -> None:
        self.marks += 1


def trained(module: Any, spec: Spec) -> Told:
    meter = Told()
    moments = module.train(spec, meter, "cpu")
    assert {moment.dtype for moment in moments} == {torch.float32}
    return meter


def test_a_model_is_a_function_of_its_shape_alone() -> None:
    packed: list[str] = []
    one = fresh("pico", "cpu").state_dict()
    other = fresh("pico", "cpu", each=lambda _, path: packed.append(path)).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(packed) == 2 * 7 and not any("lm_head" in path for path in packed)


def test_tokens_of_a_step_are_the_same_at_every_call_and_differ_between_steps() -> None:
    assert torch.equal(batch_of(SPEC, 1), batch_of(SPEC, 1)) and not torch.equal(batch_of(SPEC, 0), batch_of(SPEC, 1))
    assert batch_of(SPEC, 0).shape == (2, 48) and int(batch_of(SPEC, 0).min()) >= 3
    assert int(batch_of(SPEC, 0).max()) < 512


def test_our_rows_come_step_by_step_as_the_peers_see_them() -> None:
    model = ours_gpu.built(SPEC, "cpu")
    job = ours_gpu.job_of(SPEC, model)
    for step in range(SPEC.steps):
        job.step = step
        assert [list(example.input_ids) for example in job.rows(0)] == batch_of(SPEC, step).tolist()


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("passes", [1, 2])
def test_ours_and_peft_do_the_same_work(passes: int) -> None:
    from benchmarks import peers_gpu

    spec = SPEC.but(passes=passes)
    ours, peft = trained(ours_gpu, spec), trained(peers_gpu, spec.but(system="peft"))
    assert ours.marks == peft.marks == SPEC.steps
    assert ours.trained == peft.trained and len(ours.losses) == len(peft.losses) == SPEC.steps
    assert ours.losses == pytest.approx(peft.losses, abs=5e-3)  # bf16; A starts from other random numbers


def test_updating_in_backward_is_the_same_work() -> None:
    one, other = (trained(ours_gpu, SPEC.but(recompute=how)) for how in ("layers", "in-backward"))
    assert one.trained == other.trained and other.marks == SPEC.steps
    assert one.losses == pytest.approx(other.losses, abs=1e-3)  # the other is not clipped


def test_full_fine_tuning_trains_every_weight() -> None:
    from benchmarks import peers_gpu

    full = trained(peers_gpu, SPEC.but(system="full", storage="fp32", recompute="layers"))
    assert full.trained == sum(p.numel() for p in fresh("pico", "cpu").parameters())


def test_a_checkpoint_for_peers_holds_the_same_model_and_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("VENEER_BENCH_MODELS", str(tmp_path))
    folder = peers_checkpoint.save("pico", "cpu")
    assert peers_checkpoint.save("pico", "cpu") == folder == tmp_path / "pico"
    state, wanted = AutoModelForCausalLM.from_pretrained(folder).state_dict(), fresh("pico", "cpu").state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer("one two").input_ids) == "one two"
