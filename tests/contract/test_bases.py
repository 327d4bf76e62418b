"""The laws of BASES: a storage's products are those of its dense form, and nothing changes it.

Legend: T tokens, I in, O out.
"""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.bases import BASES
from veneer.bases.base import Base

# Of one product against float64 of the storage's own dense form, relative to |x| · |W|: only the sums' rounding.
ERROR = {torch.float32: 2**-20, torch.bfloat16: 2**-7}

shapes = {
    "outside": st.integers(1, 40),
    "inside": st.integers(1, 40),
    "tokens": st.integers(0, 9),
    "seed": st.integers(0, 999),
}


def storage(name: str) -> type[Base]:
    module, _, attribute = BASES[name].partition(":")
    return getattr(import_module(module), attribute)


def make(name: str, outside: int, inside: int, dtype=torch.float32, bias: bool = True, seed: int = 0) -> Base:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inside, outside, bias=bias)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return storage(name).from_linear(linear.to(dtype))


def near(got, left, right, wanted, dtype):
    assert got.dtype == dtype and got.shape == wanted.shape
    bound = ERROR[dtype] * (left.double().abs() @ right.double().abs() + 1e-30)
    assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", ERROR)
@given(**shapes)
def test_both_products_are_those_of_the_dense_weight(name, dtype, outside, inside, tokens, seed):
    base = make(name, outside, inside, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x_TI = torch.randn(tokens, inside, generator=generator).to(dtype)
    g_TO = torch.randn(tokens, outside, generator=generator).to(dtype)
    w_OI = base.dense()
    assert w_OI.dtype == torch.float32 and w_OI.shape == (outside, inside) == (base.out_features, base.in_features)
    near(base.matmul(x_TI), x_TI, w_OI.t(), x_TI.double() @ w_OI.double().t(), dtype)
    near(base.matmul_t(g_TO), g_TO, w_OI, g_TO.double() @ w_OI.double(), dtype)
    held_TI = torch.randn(tokens, inside, generator=generator).to(dtype)
    into_TI = held_TI.clone()
    assert base.matmul_t(g_TO, into_TI) is into_TI
    left, right = torch.cat([held_TI, g_TO], 1), torch.cat([torch.eye(inside), w_OI])  # held + g W as one product
    near(into_TI, left, right, left.double() @ right.double(), dtype)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("stored, asked", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_result_has_the_dtype_of_what_came_in(name, stored, asked):
    """Within the coarser dtype of the two."""
    base = make(name, 5, 6, stored)
    x_TI, g_TO = torch.randn(3, 6).to(asked), torch.randn(3, 5).to(asked)
    assert base.matmul(x_TI).dtype == base.matmul_t(g_TO).dtype == base.linear(x_TI).dtype == asked
    w_OI = base.dense()
    wanted = x_TI.double() @ w_OI.double().t()
    assert (
        (base.matmul(x_TI).double() - wanted).abs() <= 2**-6 * (x_TI.double().abs() @ w_OI.double().abs().t())
    ).all()


@pytest.mark.parametrize("name", BASES)
@given(**shapes)
def test_row_norms(name, outside, inside, tokens, seed):
    base = make(name, outside, inside, seed=seed)
    norms_O = base.row_norms()
    assert norms_O.dtype == torch.float32
    torch.testing.assert_close(norms_O.double(), base.dense().double().square().sum(1).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", ERROR)
def test_packed_holds_another_weight_in_the_same_storage(name, dtype):
    base = make(name, 5, 6, dtype)
    before = copy.deepcopy(base.state_dict())
    other_OI = torch.randn(5, 6)
    packed = base.packed(other_OI)
    assert type(packed) is type(base)
    assert torch.equal(packed.dense(), make_from(name, other_OI, dtype).dense())  # rounded once, by the storage alone
    assert torch.equal(packed.bias, base.bias)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    held = packed.dense()
    other_OI.zero_()  # what was given is copied
    assert torch.equal(packed.dense(), held)
    assert torch.equal(base.packed(base.dense()).dense(), base.dense())  # its own weight comes back as it was


def make_from(name: str, weight_OI: torch.Tensor, dtype: torch.dtype) -> Base:
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    linear.weight.data = weight_OI.clone()
    return storage(name).from_linear(linear.to(dtype))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("shape", [(5, 7), (6, 5), (1, 6), (5,)])
def test_packed_refuses_another_shape(name, shape):
    with pytest.raises(ValueError, match=r"wanted \(5, 6\)"):
        make(name, 5, 6).packed(torch.zeros(shape))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_layer_with_its_gradient_for_x(name, bias):
    base = make(name, 5, 6, bias=bias)
    x = torch.randn(2, 3, 6, requires_grad=True)
    g = torch.randn(2, 3, 5)
    (got,) = torch.autograd.grad(base.linear(x), x, g)
    (wanted,) = torch.autograd.grad(nn.functional.linear(x, base.dense(), base.bias), x, g)
    torch.testing.assert_close(base.linear(x), nn.functional.linear(x, base.dense(), base.bias))
    torch.testing.assert_close(got, wanted)
    assert not base.linear(x.detach()).requires_grad


@pytest.mark.parametrize("name", BASES)
def test_nothing_of_it_is_trained_or_changed(name):
    base = make(name, 5, 6)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    before = copy.deepcopy(base.state_dict())
    x_TI = torch.randn(3, 6, requires_grad=True)
    given = x_TI.detach().clone()
    base.dense().zero_()  # a copy
    base.row_norms().zero_()
    base.matmul(x_TI.detach()).zero_()
    base.linear(x_TI).sum().backward()
    assert torch.equal(x_TI.detach(), given)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("name", BASES)
def test_listing_the_table_imports_no_storage(name):
    assert BASES[name].startswith("veneer.bases.") and issubclass(storage(name), Base)
