"""The laws of METHODS × BASES, at dropout 0.

merged equals delta; starts as the base; plain acts the same; the base is never changed; the state is only what is
learned; gradients reach all of it; from_tensors is the inverse of tensors. Legend: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from veneer.bases import BASES
from veneer.bases.base import Base
from veneer.errors import NotMergeable
from veneer.methods import METHODS, method_class
from veneer.methods.base import Method
from veneer.methods.biased import BiasedLoRA, RebiasedLoRA
from veneer.methods.dora import DoRA
from veneer.methods.init import INITS
from veneer.methods.lora import LoRA

# name -> (a, b, scale, base) -> method. A new method adds its line here.
MAKERS = {
    "lora": lambda a_RI, b_OR, scale, base: LoRA(a_RI, b_OR, scale),
    "dora": lambda a_RI, b_OR, scale, base: DoRA(a_RI, b_OR, base.row_norms(), scale),
    "biased": lambda a_RI, b_OR, scale, base: BiasedLoRA(a_RI, b_OR, torch.zeros(len(b_OR)), scale),
    "rebiased": lambda a_RI, b_OR, scale, base: RebiasedLoRA(a_RI, b_OR, base.bias.detach().clone(), scale),
}
BIASED = ("biased", "rebiased")
VECTOR = ("dora", *BIASED)  # with a vector beside the factors
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
    method = new(name, make_base("dense", inside, outside, seed), rank, scale, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in method.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return method


def new(name: str, base: Base, rank: int, scale: float, seed: int, init: str = "kaiming") -> Method:
    shape = torch.empty(base.out_features, base.in_features)
    a_RI, b_OR = INITS[init].factors(shape, rank, scale, torch.Generator().manual_seed(seed))
    return MAKERS[name](a_RI, b_OR, scale, base)


def tokens(inside: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(7, inside, generator=torch.Generator().manual_seed(seed + 2)).to(dtype)


def close(got, wanted, size):
    """float32 sums of at most 24 · 6 terms whose sizes sum to `size`."""
    assert ((got - wanted).abs() <= 1e-5 * size + 1e-6).all()


def test_every_method_is_made_here():
    assert set(MAKERS) == set(METHODS)
    for name in METHODS:
        assert type(new(name, make_base("dense", 4, 3), 2, 1.0, 0)) is method_class(name) is named(METHODS, name)
        assert issubclass(method_class(name), Method) and method_class(name).name == name


@pytest.mark.parametrize("name, base", [pair for pair in PAIRS if pair[0] not in BIASED])
@settings(max_examples=25)
@given(**shapes)
def test_merged_equals_delta(name, base, inside, outside, rank, scale, seed):
    method, frozen = trained(name, inside, outside, rank, scale, seed), make_base(base, inside, outside, seed)
    x_TI = tokens(inside, seed)
    y_TO = frozen.matmul(x_TI)
    merged_OI = method.merged(frozen)
    assert merged_OI.dtype == torch.float32 and merged_OI.shape == (outside, inside)
    delta_TO = method.delta(x_TI, y_TO, frozen)
    size = x_TI.abs() @ merged_OI.abs().t() + y_TO.abs() + delta_TO.abs()
    if name == "dora":  # c² is a sum whose terms may cancel
        update_OI = (method.b_OR * scale) @ method.a_RI
        terms_O = frozen.row_norms().square() + update_OI.square().sum(1)
        size = size * (terms_O / method.norms(frozen).square()).clamp_min(1)
    close(x_TI @ merged_OI.t(), y_TO + delta_TO, size)
    assert delta_TO.abs().max() > 0


@pytest.mark.parametrize("name, base", PAIRS)
@pytest.mark.parametrize("init", [name for name, start in INITS.items() if not start.anchored])
@settings(max_examples=25)
@given(**shapes)
def test_a_new_method_is_the_base_to_the_bit(name, base, init, inside, outside, rank, scale, seed):
    frozen = make_base(base, inside, outside, seed)
    method = new(name, frozen, rank, scale, seed, init)
    x_TI = tokens(inside, seed)
    y_TO = frozen.matmul(x_TI)
    assert torch.equal(y_TO + method.delta(x_TI, y_TO, frozen), y_TO)
    assert name in BIASED or torch.equal(method.merged(frozen), frozen.dense())


@pytest.mark.parametrize("name, base", PAIRS)
@settings(max_examples=25)
@given(**shapes)
def test_plain_acts_the_same(name, base, inside, outside, rank, scale, seed):
    method, frozen = trained(name, inside, outside, rank, scale, seed), make_base(base, inside, outside, seed)
    x_TI = tokens(inside, seed)
    if name in VECTOR:
        with pytest.raises(NotMergeable, match="no exact plain"):
            method.plain()
        return
    a_RI, b_OR = method.plain()
    assert a_RI.dtype == b_OR.dtype == torch.float32
    assert a_RI.shape[1] == inside and b_OR.shape == (outside, len(a_RI))
    wanted_TO = method.delta(x_TI, frozen.matmul(x_TI), frozen)
    close(x_TI @ a_RI.t() @ b_OR.t(), wanted_TO, (x_TI.abs() @ a_RI.abs().t()) @ b_OR.abs().t())


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25)
@given(**shapes)
def test_from_tensors_is_the_inverse_of_tensors(name, inside, outside, rank, scale, seed):
    """The scale is divided out and multiplied in again: b is off by a rounding each, 2⁻²³ in all; the rest is equal."""
    method = trained(name, inside, outside, rank, scale, seed)
    held = method.tensors()
    again = type(method).from_tensors(held, scale)
    assert tuple(held) == method.kinds and again.scale == method.scale and again.rank == method.rank == rank
    wanted, found = method.state_dict(), again.state_dict()
    scaled = {"b_OR", *(["c_O"] if name == "biased" else [])}
    assert all(torch.equal(found[key], wanted[key]) for key in wanted if key not in scaled)
    for key in scaled:
        torch.testing.assert_close(found[key], wanted[key], rtol=2**-22, atol=0)
    torch.testing.assert_close(again.tensors()["b"], held["b"], rtol=2**-22, atol=0)
    if scale == 2 ** round(torch.tensor(scale).log2().item()):
        assert torch.equal(again.tensors()["b"], held["b"])


@pytest.mark.parametrize("name", METHODS)
def test_tensors_and_from_tensors_give_copies(name):
    method = trained(name, 6, 5, 2, 1.0, 0)
    before = copy.deepcopy(method.state_dict())
    held = method.tensors()
    again = type(method).from_tensors(held, 1.0)
    for tensor in held.values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_restore_puts_back_in_the_same_memory(name):
    method, other = trained(name, 6, 5, 2, 0.5, 0), trained(name, 6, 5, 2, 0.5, 1)
    memory = [parameter.data_ptr() for parameter in method.parameters()]
    method.restore(other.tensors())
    assert memory == [parameter.data_ptr() for parameter in method.parameters()]
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in method.state_dict().items())
    with pytest.raises(ValueError, match="wanted"):
        method.restore(trained(name, 6, 5, 3, 0.5, 1).tensors())


@pytest.mark.parametrize("name, base", [pair for pair in PAIRS if pair[0] not in BIASED])
def test_update_norm_is_that_of_the_merged_weights_change(name, base):
    method, frozen = trained(name, 9, 7, 2, 0.7, 3), make_base(base, 9, 7, 3)
    wanted = (method.merged(frozen).double() - frozen.dense().double()).norm().item()
    assert method.update_norm(frozen) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name, base", PAIRS)
def test_the_base_and_the_inputs_are_never_changed(name, base):
    method, frozen, x_TI = trained(name, 6, 5, 2, 0.7, 0), make_base(base, 6, 5), tokens(6, 0)
    y_TO = frozen.matmul(x_TI)
    state, x, y = copy.deepcopy(frozen.state_dict()), x_TI.clone(), y_TO.clone()
    learned = copy.deepcopy(method.state_dict())
    method.delta(x_TI, y_TO, frozen).sum().backward()
    if name not in BIASED:
        method.merged(frozen).zero_()
    method.tensors()
    assert torch.equal(x_TI, x) and torch.equal(y_TO, y)
    assert all(torch.equal(value, state[key]) for key, value in frozen.state_dict().items())
    assert all(torch.equal(value, learned[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_only_what_is_learned(name):
    method = trained(name, 6, 5, 2, 0.7, 0)
    assert set(method.state_dict()) == {key for key, value in method.named_parameters() if value.requires_grad}
    assert sum(p.numel() for p in method.parameters()) == 2 * (6 + 5) + (5 if name in VECTOR else 0)
    assert all(p.dtype == torch.float32 for p in method.parameters())


@pytest.mark.parametrize("name, base", PAIRS)
@settings(max_examples=25)
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
    if name in VECTOR:
        with pytest.raises(ValueError, match="gated by rank"):
            method.delta(x_TI, y_TO, frozen, torch.ones(7, 3))
        return
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
    assert name in BIASED or method.merged(frozen).dtype == torch.float32


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_is_not_merged_into_a_weight(name):
    with pytest.raises(NotMergeable, match="learned a bias"):
        trained(name, 6, 5, 2, 0.7, 0).merged(make_base("dense", 6, 5))
