"""Dropout is a function of (seed, job, step, module, row): drawn again, alone or beside others, it is the same."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings
from veneer.model import leaf
from veneer.model.dropout import dropout_key, dropout_mask
from veneer.model.packed import hidden_states, running, speaking
from veneer.model.stream import pack

LIKE = torch.zeros(1, 16)


@given(st.integers(0, 2**40), st.integers(1, 40), st.sampled_from([0.1, 0.5, 0.9]))
def test_same_key_same_mask(key, rows, probability):
    first = dropout_mask(key, "q_proj", rows, LIKE, probability)
    torch.manual_seed(1)  # torch's own generator has no part in it
    assert torch.equal(first, dropout_mask(key, "q_proj", rows, LIKE, probability))
    assert first.shape == (rows, 16)
    assert set(first.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - probability)).item()}


def test_it_leaves_torchs_generator_alone():
    before = torch.random.get_rng_state()
    dropout_mask(dropout_key(0, "job", 1), "q_proj", 8, LIKE, 0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seed_job_step_and_module_each_make_another_mask():
    masks = [
        dropout_mask(key, module, 8, LIKE, 0.5)
        for key in (dropout_key(0, "a", 1), dropout_key(1, "a", 1), dropout_key(0, "b", 1), dropout_key(0, "a", 2))
        for module in ("q_proj", "k_proj")
    ]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


def test_keys_are_those_that_they_were():
    """A checkpoint resumed with another version of veneer draws the masks that it would have drawn."""
    assert dropout_key(3, "job", 7) == 2355950556736694054
    assert dropout_mask(1, "q_proj", 1, LIKE[:, :8], 0.5).tolist() == [[2, 0, 2, 2, 0, 0, 0, 2]]


@given(st.sampled_from([0.1, 0.5, 0.9]), st.integers(0, 1000))
@settings(max_examples=20)
def test_the_mean_is_kept(probability, key):
    """Inverted dropout: 40,000 draws have mean 1 within 6 standard deviations."""
    mask = dropout_mask(key, "m", 200, torch.zeros(1, 200), probability)
    assert abs(mask.mean().item() - 1) < 6 * (probability / (1 - probability)) ** 0.5 / 200
    rows, columns = mask.mean(1), mask.mean(0)
    assert rows.unique().numel() > 5 and columns.unique().numel() > 5  # neither one draw a row nor one a column


def test_the_mask_has_the_inputs_dtype():
    assert dropout_mask(1, "m", 2, LIKE.bfloat16(), 0.5).dtype == torch.bfloat16


# In the model.


@pytest.fixture
def model(pico):
    for name in ("one", "two"):
        attach(pico, LoraSettings(r=2, lora_dropout=0.4), name)
        for path, method in methods_of(pico, name).items():
            generator = torch.Generator().manual_seed(len(path) + len(name))
            method.b_OR.data = torch.randn(method.b_OR.shape, generator=generator) * 0.1
    return pico


def step(model, sequences, slots, keys):
    """Hidden states and the gradients of A of both slots."""
    model.zero_grad()
    with running(model, pack(sequences, slots, dropout_keys=keys)):
        hidden = hidden_states(model)
        hidden.square().sum().backward()
    grads = {
        name: [
            method.a_RI.grad if method.a_RI.grad is None else method.a_RI.grad.clone()
            for method in methods_of(model, name).values()
        ]
        for name in ("one", "two")
    }
    return hidden.detach(), grads


def base_alone(model, sequences):
    with torch.no_grad(), running(model, pack(sequences)):
        return hidden_states(model)


FIRST, SECOND = [[3, 4, 5, 6], [7, 8]], [[9, 10, 11], [12]]


def test_the_same_step_again_is_equal_to_the_bit(model):
    keys = {"one": 11, "two": 12}
    got, again = (step(model, FIRST + SECOND, ["one", "one", "two", "two"], keys) for _ in range(2))
    assert torch.equal(got[0], again[0])
    assert all(torch.equal(a, b) for name in got[1] for a, b in zip(got[1][name], again[1][name], strict=True))
    other = step(model, FIRST + SECOND, ["one", "one", "two", "two"], {"one": 13, "two": 12})
    assert (got[0][:6] - other[0][:6]).abs().max() > 1e-3
    torch.testing.assert_close(got[0][6:], other[0][6:])


@pytest.mark.parametrize("behind", [False, True])
def test_a_job_alone_draws_the_masks_that_it_draws_beside_others(model, behind):
    alone = step(model, FIRST, ["one", "one"], {"one": 11})
    if behind:
        both = step(model, SECOND + FIRST, ["two", "two", "one", "one"], {"one": 11, "two": 12})
        hidden = both[0][4:]
    else:
        both = step(model, FIRST + SECOND, ["one", "one", "two", "two"], {"one": 11, "two": 12})
        hidden = both[0][:6]
    torch.testing.assert_close(hidden, alone[0], rtol=1e-4, atol=1e-5)  # another order of sums in wider products
    for mine, wanted in zip(both[1]["one"], alone[1]["one"], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)


def test_checkpointed_layers_draw_the_same_again(model):
    wanted = step(model, FIRST, ["one", "one"], {"one": 11})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = step(model, FIRST, ["one", "one"], {"one": 11})
    assert torch.equal(got[0], wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1]["one"], wanted[1]["one"], strict=True))


def test_every_module_draws_a_mask_of_its_own(model):
    """Else the query and key layers, whose inputs are the same, would drop the same places."""
    drawn = []
    spy = mock.patch.object(
        leaf, "dropout_mask", side_effect=lambda *args: drawn.append(dropout_mask(*args)) or drawn[-1]
    )
    with spy:
        step(model, FIRST, ["one", "one"], {"one": 11})
    wide = {tuple(mask.flatten().tolist()) for mask in drawn if mask.shape[1] == 32}
    assert len(drawn) == 14 and len(wide) == 12


def test_without_a_key_nothing_is_dropped(model):
    plain = copy.deepcopy(model)
    for name in ("one", "two"):
        for method in methods_of(plain, name).values():
            method.dropout = 0.0
    model.train()  # train() and eval() hide nothing in the packed forward
    got = step(model, FIRST + SECOND, ["one", "one", "two", "two"], {"two": 12})[0]
    wanted = step(plain, FIRST + SECOND, ["one", "one", "two", "two"], {})[0]
    torch.testing.assert_close(got[:6], wanted[:6], rtol=1e-4, atol=1e-5)
    assert (got[6:] - wanted[6:]).abs().max() > 1e-3


def test_dropout_is_on_the_update_alone(model):
    for method in methods_of(model, "one").values():
        method.b_OR.data.zero_()
    dropped = step(model, FIRST, ["one", "one"], {"one": 11})[0]
    torch.testing.assert_close(dropped, base_alone(model, FIRST), rtol=1e-4, atol=1e-5)


def test_ordinary_calls_drop_in_training_mode_only(model):
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), speaking(model, "one"):
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        torch.manual_seed(5)
        first = model(ids).logits
        torch.manual_seed(5)
        assert torch.equal(model(ids).logits, first)
