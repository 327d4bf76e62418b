"""How many layers keep their activations, and which pass is the largest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.chat import Example
from veneer.model.layers import Run, decoder_layers
from veneer.train.fit import FEWER, MORE, fit, fitting, largest
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
    assert not any(run.compiled or run.shelf for run in runs)


def test_compiled_where_asked(pico, job, examples):
    made = job(pico, "default", examples(8), torch_compile=True)
    fit(pico, made, made.settings, ALONE)
    assert all(vars(layer)["forward"].compiled for layer in decoder_layers(pico))
