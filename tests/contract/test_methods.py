"""The laws of METHODS × BASES, at dropout 0.

merged equals delta; starts as the base; plain acts the same; the base is never changed; the state is only what is
learned; gradients reach all of it; from_plain is the inverse of plain. Legend: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from veneer.bases import BASES
from veneer.bases.base import Base
from veneer.errors import NotMergeable
from veneer.methods import METHODS
from veneer.methods.base import Method
from veneer.methods.init import INITS
from veneer.methods.lora import LoRA

# name -> (a, b, scale) -> method. A new method adds its line here.
MAKERS = {"lora": LoRA}
PAIRS = [(method, base) for method in METHODS for base in BASES]

shapes = {
    "inside": st.integers(1, 24),
    "outside": st.integers(1, 24),
    "rank": st.integers(1, 6),
    "scale": st.sampled_from([1.0, 2.0, 0.3, 32 / 7, 1e-3]),
    "seed": st.integers(0, 999),
}


def named(table: dict[str, str], name: str) -> type:
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)


def make_base(name: str, inside: int, outside: int, seed: int = 0, dtype=torch.float32) -> Base:
    linear = nn.Linear(inside, outside)
    generator = torch.Generator().manual_seed(seed)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return named(BASES, name).from_linear(linear.to(dtype))


def trained(name: str, inside: int, outside: int, rank: int, scale: float, seed: int) -> Method:
    """A method far from its start: all that it learns is random."""
    method = new(name, inside, outside, rank, scale, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in method.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return method


def new(name: str, inside: int, outside: int, rank: int, scale: float, seed: int, init: str = "kaiming") -> Method:
    a_RI, b_OR = INITS[init](torch.zeros(outside, inside), rank, torch.Generator().manual_seed(seed))
    return MAKERS[name](a_RI, b_OR, scale)


def tokens(inside: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(7, inside, generator=torch.Generator().manual_seed(seed + 2)).to(dtype)


def close(got, wanted, size):
    """float32 sums of at most 24 · 6 terms whose sizes sum to `size`."""
    assert ((got - wanted).abs() <= 1e-5 * size + 1e-6).all()


def test_every_method_is_made_here():
    assert set(MAKERS) == set(METHODS)
    for name in METHODS:
        assert MAKERS[name] is named(METHODS, name) and issubclass(MAKERS[name], Method)


@pytest.mark.parametrize("name, base", PAIRS)
@given(**shapes)
def test_merged_equals_delta(name, base, inside, outside, rank, scale, seed):
    method, frozen = trained(name, inside, outside, rank, scale, seed), make_base(base, inside, outside, seed)
    x_TI = tokens(inside, seed)
    y_TO = frozen.matmul(x_TI)
    try:
        merged_OI = method.merged(frozen)
    except NotMergeable:
        assume(False)
    assert merged_OI.dtype == torch.float32 and merged_OI.shape == (outside, inside)
    delta_TO = method.delta(x_TI, y_TO, frozen)
    size = x_TI.abs() @ merged_OI.abs().t() + y_TO.abs() + delta_TO.abs()
    close(x_TI @ merged_OI.t(), y_TO + delta_TO, size)
    assert delta_TO.abs().max() > 0


@pytest.mark.parametrize("name, base", PAIRS)
@pytest.mark.parametrize("init", INITS)
@given(**shapes)
def test_a_new_method_is_the_base_to_the_bit(name, base, init, inside, outside, rank, scale, seed):
    method, frozen = new(name, inside, outside, rank, scale, seed, init), make_base(base, inside, outside, seed)
    x_TI = tokens(inside, seed)
    y_TO = frozen.matmul(x_TI)
    assert torch.equal(y_TO + method.delta(x_TI, y_TO, frozen), y_TO)
    assert torch.equal(method.merged(frozen), frozen.dense())


@pytest.mark.parametrize("name, base", PAIRS)
@given(**shapes)
def test_plain_acts_the_same(name, base, inside, outside, rank, scale, seed):
    method, frozen = trained(name, inside, outside, rank, scale, seed), make_base(base, inside, outside, seed)
    x_TI = tokens(inside, seed)
    try:
        a_RI, b_OR = method.plain()
    except NotMergeable:
        assume(False)
    assert a_RI.dtype == b_OR.dtype == torch.float32
    assert a_RI.shape[1] == inside and b_OR.shape == (outside, len(a_RI))
    wanted_TO = method.delta(x_TI, frozen.matmul(x_TI), frozen)
    close(x_TI @ a_RI.t() @ b_OR.t(), wanted_TO, (x_TI.abs() @ a_RI.abs().t()) @ b_OR.abs().t())


@pytest.mark.parametrize("name", METHODS)
@given(**shapes)
def test_from_plain_is_the_inverse_of_plain(name, inside, outside, rank, scale, seed):
    """The scale is divided out and multiplied in again: b is off by one rounding each, 2⁻²³ in all; a is equal."""
    method = trained(name, inside, outside, rank, scale, seed)
    a_RI, b_OR = method.plain()
    again = type(method).from_plain(a_RI, b_OR, scale)
    assert again.scale == method.scale
    assert torch.equal(again.a_RI, method.a_RI)
    torch.testing.assert_close(again.b_OR.detach(), method.b_OR.detach(), rtol=2**-22, atol=0)
    torch.testing.assert_close(again.plain()[1], b_OR, rtol=2**-22, atol=0)
    if scale == 2 ** round(torch.tensor(scale).log2().item()):
        assert torch.equal(again.plain()[1], b_OR)


@pytest.mark.parametrize("name", METHODS)
def test_plain_and_from_plain_give_copies(name):
    method = trained(name, 6, 5, 2, 1.0, 0)
    before = copy.deepcopy(method.state_dict())
    a_RI, b_OR = method.plain()
    again = type(method).from_plain(a_RI, b_OR)
    for tensor in (a_RI, b_OR):
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("name, base", PAIRS)
def test_the_base_and_the_inputs_are_never_changed(name, base):
    method, frozen, x_TI = trained(name, 6, 5, 2, 0.7, 0), make_base(base, 6, 5), tokens(6, 0)
    y_TO = frozen.matmul(x_TI)
    state, x, y = copy.deepcopy(frozen.state_dict()), x_TI.clone(), y_TO.clone()
    learned = copy.deepcopy(method.state_dict())
    method.delta(x_TI, y_TO, frozen).sum().backward()
    method.merged(frozen).zero_()
    method.plain()
    assert torch.equal(x_TI, x) and torch.equal(y_TO, y)
    assert all(torch.equal(value, state[key]) for key, value in frozen.state_dict().items())
    assert all(torch.equal(value, learned[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_only_what_is_learned(name):
    method = trained(name, 6, 5, 2, 0.7, 0)
    assert set(method.state_dict()) == {key for key, value in method.named_parameters() if value.requires_grad}
    assert sum(p.numel() for p in method.parameters()) == 2 * (6 + 5)
    assert all(p.dtype == torch.float32 for p in method.parameters())


@pytest.mark.parametrize("name, base", PAIRS)
@given(**shapes)
def test_gradients_reach_every_parameter(name, base, inside, outside, rank, scale, seed):
    method, frozen = trained(name, inside, outside, rank, scale, seed), make_base(base, inside, outside, seed)
    x_TI = tokens(inside, seed).requires_grad_()
    method.delta(x_TI, frozen.matmul(x_TI.detach()), frozen).square().sum().backward()
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key
    assert x_TI.grad.any()
    assert all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize("name, base", PAIRS)
def test_a_gate_scales_each_rank_of_each_token(name, base):
    """Zero silences, one changes nothing, and gates of the ranks add up."""
    method, frozen, x_TI = trained(name, 6, 5, 3, 0.7, 0), make_base(base, 6, 5), tokens(6, 0)
    y_TO = frozen.matmul(x_TI)
    whole = method.delta(x_TI, y_TO, frozen)
    torch.testing.assert_close(method.delta(x_TI, y_TO, frozen, torch.ones(7, 3)), whole)
    assert not method.delta(x_TI, y_TO, frozen, torch.zeros(7, 3)).any()
    one_each = [method.delta(x_TI, y_TO, frozen, torch.eye(3)[r].expand(7, 3)) for r in range(3)]
    torch.testing.assert_close(sum(one_each), whole)
    one_token = method.delta(x_TI, y_TO, frozen, torch.eye(7)[:, 2:3].expand(7, 3))
    assert one_token[2].any() and not one_token[[0, 1, 3, 4, 5, 6]].any()


@pytest.mark.parametrize("name, base", PAIRS)
def test_bfloat16_inputs_give_bfloat16_updates(name, base):
    method, frozen = trained(name, 24, 20, 3, 0.7, 0), make_base(base, 24, 20, dtype=torch.bfloat16)
    x_TI = tokens(24, 0, torch.bfloat16)
    delta_TO = method.delta(x_TI, frozen.matmul(x_TI), frozen)
    wanted_TO = method.delta(x_TI.float(), frozen.matmul(x_TI.float()), frozen)
    assert delta_TO.dtype == torch.bfloat16
    # Factors, z and the update are each rounded to 2⁻⁹: 4 roundings, in norm.
    assert (delta_TO.float() - wanted_TO).norm() < 4 * 2**-9 * wanted_TO.norm()
    assert method.merged(frozen).dtype == torch.float32
