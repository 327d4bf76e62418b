"""How many layers keep their activations, and which pass is the largest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.data.chat import Example
from veneer.model.layers import Run, decoder_layers
from veneer.train.feed import Feed
from veneer.train.fit import FEWER, MORE, SPARE, Measured, _kept, fit, fitting, largest
from veneer.train.passes import Passes
from veneer.train.ranks import ALONE


@given(
    base=st.integers(0, 10**9), each=st.integers(1, 10**9), most=st.integers(0, 4 * 10**10), layers=st.integers(4, 80)
)
def test_as_many_layers_as_fit(base, each, most, layers):
    def peak(kept):
        return base + kept * each

    kept = fitting(peak(FEWER), peak(MORE), most, layers)
    assert FEWER <= kept <= layers
    assert kept == FEWER or peak(kept) <= most
    assert kept == layers or peak(kept + 1) > most


def test_where_two_more_layers_do_not_fit_one_is_kept():
    assert fitting(5e9, float("inf"), 8e9, 32) == FEWER


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_largest_pass(pico, job, accumulation):
    lengths = [3, 9, 30, 4, 28, 5, 6, 7]
    rows = [Example(tuple(range(3, 3 + n)), (False,) + (True,) * (n - 1), i, 0) for i, n in enumerate(lengths)]
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": 100}
    made = job(pico, "default", rows, **settings)
    step, micro = largest(made)
    found = sum(len(example.input_ids) for example in made.rows(micro, step))
    steps = range(made.batches.steps_per_epoch)
    assert found == max(
        sum(len(example.input_ids) for example in made.rows(micro, step))
        for step in steps
        for micro in range(accumulation)
    )


@pytest.mark.parametrize("asked, recomputed", [("auto", False), (False, False), (True, True), ("offload", True)])
def test_on_the_cpu(pico, job, examples, asked, recomputed):
    made = job(pico, "default", examples(8), gradient_checkpointing=asked)
    fitted = fit(pico, made, made.settings, ALONE)
    assert fitted == (False, [])
    runs = [vars(layer)["forward"] for layer in decoder_layers(pico)]
    assert all(isinstance(run, Run) and (run.number is not None) == recomputed for run in runs)
    assert not any(run.how.compiled or run.how.shelf for run in runs)


def test_compiled_where_asked(pico, job, examples):
    made = job(pico, "default", examples(8), torch_compile=True)
    fit(pico, made, made.settings, ALONE)
    assert all(vars(layer)["forward"].how.compiled for layer in decoder_layers(pico))


@pytest.fixture
def five_layers(job, examples):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    return model, job(model, "default", examples(16))


def pretend(monkeypatch, peaks: list[float], free: int) -> None:
    """A GPU whose allocator reaches these peaks, one a pass."""
    told = iter(peaks)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(told))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0, raising=False)


@pytest.mark.parametrize("free, kept", [(10**9, 5), (4 * 10**6, 3), (10**6, 1)])
def test_measuring_changes_nothing_but_the_arrangement(five_layers, monkeypatch, free, kept):
    model, made = five_layers
    values = made.flat.values_P.detach().clone()
    # 0.5 MB beside the layers, 1 MB of activations each; the optimiser will ask for 8 bytes a parameter more.
    pretend(monkeypatch, [9e9, 1.5e6, 3.5e6], int((free + 8 * len(made.flat)) / (1 - SPARE)))
    found, note = _kept(Measured(model, made, ALONE, False), False, 5)
    assert found == kept
    assert (note is None) == (kept == 5) and (note is None or f"{5 - kept} of 5 layers" in note)
    assert torch.equal(made.flat.values_P, values) and not made.flat.grads_P.any() and not made.optimizer.state
    assert made.step == 0 and made.tokens == 0


def test_what_is_measured_is_packed_as_the_run_packs_it(five_layers, monkeypatch):
    model, made = five_layers
    pretend(monkeypatch, [1.0], 10**8)
    step, micro = largest(made)
    ready = Measured(model, made, ALONE, True).ready
    wanted = Feed(Passes(model, True)).ready([made], micro, step)[1]
    assert torch.equal(ready.stream.token_ids_T, wanted.stream.token_ids_T)


@pytest.mark.parametrize("peak, twice", [(4e6, True), (6e6, False)])
def test_graphs_need_the_activations_memory_twice(five_layers, monkeypatch, peak, twice):
    model, made = five_layers
    pretend(monkeypatch, [1.0, peak], int((10**7 + 8 * len(made.flat)) / (1 - SPARE)) + 9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    assert Measured(model, made, ALONE, False).fits_twice() is twice


def test_two_more_layers_that_do_not_fit_are_no_error(five_layers, monkeypatch):
    model, made = five_layers
    pretend(monkeypatch, [1e6, 1e6], 10**8)
    passes = []

    def computed(model, ready):
        passes.append(ready)
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("veneer.train.fit.computed", computed)
    assert _kept(Measured(model, made, ALONE, False), False, 5)[0] == FEWER


def test_a_pass_that_does_not_fit_is_an_error(five_layers, monkeypatch):
    model, made = five_layers
    pretend(monkeypatch, [], 10**8)

    def computed(model, ready):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("veneer.train.fit.computed", computed)
    with pytest.raises(torch.OutOfMemoryError):
        Measured(model, made, ALONE, False)
    assert not made.flat.grads_P.any()
