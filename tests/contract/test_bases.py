"""The laws of BASES: a storage's products are those of its dense form, and nothing changes it.

Legend: T tokens, I in, O out.
"""

from __future__ import annotations

import copy
import io
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from veneer.bases import BASES
from veneer.bases.base import Base
from veneer.errors import ModelError

# Of one product against float64 of the storage's own dense form, relative to |x| · |W|: only the sums' rounding.
ERROR = {torch.float32: 2**-20, torch.bfloat16: 2**-7}

# Of the stored weight, relative to a Gaussian one of 256 x 1024, as measured; it varies by a hundredth between draws.
# What is known of it: 0.0918 for NF4 and 0.1075 for int4 with blocks of 64 (QLoRA, arXiv 2305.14314, and its code).
GAUSSIAN = {
    "dense": 0.0,
    "int8": 0.0079,
    "int8-outlier": 0.0079,
    "int4": 0.1076,
    "nf4": 0.0920,
    "nf4-dq": 0.0921,
    "fp8": 0.0264,
}
# What a second encoding of the decoded weight changes, relative to its largest element: scales are rounded once more.
# Magnitudes in 8 bits lie up to 0.9 / 64 of their range apart.
AGAIN = {"int8": 2**-21, "int8-outlier": 2**-21, "fp8": 2**-21, "nf4-dq": 2**-6}

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


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtypes, shapes and bytes; `torch.equal` does not know e4m3 in every case."""
    left_bytes, right_bytes = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left_bytes, right_bytes)


def near(got, left, right, wanted, dtype):
    assert got.dtype == dtype and got.shape == wanted.shape
    bound = ERROR[dtype] * (left.double().abs() @ right.double().abs() + 1e-30)
    assert ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("name", BASES)
@given(**shapes)
def test_products_of_several_layers_are_those_of_each(name, outside, inside, tokens, seed):
    one, two = make(name, outside, inside, seed=seed), make(name, outside + 3, inside, seed=seed + 1)
    x_TI = torch.randn(tokens, inside, generator=torch.Generator().manual_seed(seed))
    into = torch.randn(tokens, outside + 3, generator=torch.Generator().manual_seed(seed + 2))
    found = type(one).matmuls([one, two], x_TI, [None, into.clone()])
    assert torch.equal(found[0], one.matmul(x_TI)) and torch.equal(found[1], two.matmul(x_TI, into.clone()))


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
    held_TO = torch.randn(tokens, outside, generator=generator).to(dtype)
    for product, rows, held, w in ((base.matmul_t, g_TO, held_TI, w_OI), (base.matmul, x_TI, held_TO, w_OI.t())):
        into = held.clone()
        assert product(rows, into) is into
        left, right = (
            torch.cat([held, rows], 1),
            torch.cat([torch.eye(w.shape[1]), w]),
        )  # held + rows · w as one product
        near(into, left, right, left.double() @ right.double(), dtype)


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


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", ERROR)
@given(**shapes)
def test_its_own_weight_comes_back_as_it_was(name, dtype, outside, inside, tokens, seed):
    base = make(name, outside, inside, dtype, seed=seed)
    w_OI = base.dense()
    assert (base.packed(w_OI).dense() - w_OI).abs().max() <= AGAIN.get(name, 0.0) * w_OI.abs().max()


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
def test_error_of_a_gaussian_weight(name):
    w_OI = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    error = torch.linalg.vector_norm(storage(name).from_weight(w_OI).dense() - w_OI) / torch.linalg.vector_norm(w_OI)
    assert error == pytest.approx(GAUSSIAN[name], rel=0.02)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(**shapes)
def test_decoding_rounds_once(name, dtype, outside, inside, tokens, seed):
    base = make(name, outside, inside, seed=seed)
    w_OI = base.decode(dtype)
    assert w_OI.dtype == dtype and w_OI.is_contiguous()
    assert torch.equal(w_OI, base.dense().to(dtype))
    assert base.decode().dtype == base.dtype == torch.float32


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_a_cast_of_the_model_reaches_the_bias_and_leaves_packed_bytes_alone(name, cast):
    base = make(name, 9, 70)
    held = {key: value.clone() for key, value in base.named_parameters()}
    w_OI = base.dense()
    wanted = getattr(nn.Linear(1, 1), cast)().weight.dtype
    assert getattr(nn.Sequential(base), cast)()[0] is base
    assert base.dtype == base.decode().dtype == base.bias.dtype == wanted
    if name != "dense":
        assert all(same(value, held[key]) for key, value in base.named_parameters() if key != "bias")
        assert torch.equal(base.dense(), w_OI)
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@given(**shapes)
def test_a_checkpoint_fills_an_empty_one(name, bias, device, outside, inside, tokens, seed):
    base = make(name, outside, inside, torch.bfloat16, bias, seed)
    state = load(save({key: value.contiguous() for key, value in base.state_dict().items()}))
    empty = storage(name).empty(outside, inside, bias, torch.bfloat16, device)
    assert empty.device.type == device and empty.dtype == torch.bfloat16 and (empty.bias is not None) == bias
    assert empty.state_dict().keys() == state.keys()
    assert all(value.shape == state[key].shape for key, value in empty.state_dict().items() if "quant_state" not in key)
    empty.load_state_dict(state, assign=device == "meta")
    assert empty.device.type == "cpu"
    assert torch.equal(empty.decode(), base.decode())
    assert not bias or torch.equal(empty.bias, base.bias)
    assert not any(parameter.requires_grad for parameter in empty.parameters())
    again = empty.state_dict()
    assert all(same(value, again[key]) for key, value in state.items())


@pytest.mark.parametrize("name", BASES)
def test_a_checkpoint_of_another_shape_is_refused(name):
    with pytest.raises((ModelError, RuntimeError), match="weight"):
        storage(name).empty(5, 7, False, torch.float32).load_state_dict(make(name, 6, 80, bias=False).state_dict())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(name, fault):
    w_OI = torch.randn(5, 70)
    w_OI[4, 69] = fault
    with pytest.raises(ModelError, match=f"{name}: .*NaN or infinity"):
        storage(name).from_weight(w_OI)
    with pytest.raises(ModelError):
        make(name, 5, 70).packed(w_OI)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("w", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(0, 4), torch.ones(2, 3).int()])
def test_what_is_no_matrix_of_floats_is_refused(name, w):
    with pytest.raises(ModelError, match=f"{name}: .*wanted a float matrix"):
        storage(name).from_weight(w)


@pytest.mark.parametrize("name", BASES)
def test_a_weight_of_zeros_stays_one(name):
    base = storage(name).from_weight(torch.zeros(3, 70))
    assert torch.equal(base.dense(), torch.zeros(3, 70))
    assert torch.equal(base.matmul(torch.randn(2, 70)), torch.zeros(2, 3))


def pickled(base: Base) -> Base:
    """Through a file of torch's: alone, pickle fails on any tensor of e4m3."""
    file = io.BytesIO()
    torch.save(base, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_equal_and_their_own(name, copied):
    base = make(name, 5, 70, torch.bfloat16)
    other = copied(base)
    assert type(other) is type(base) and other.dtype == base.dtype
    assert torch.equal(other.dense(), base.dense()) and torch.equal(other.bias, base.bias)
    memory = {value.data_ptr() for value in base.parameters()}
    assert not memory & {value.data_ptr() for value in other.parameters()}


@pytest.mark.parametrize("name", BASES)
def test_encoding_reads_a_weight_and_leaves_it(name):
    w_OI = torch.randn(8, 70)
    before = w_OI.clone()
    storage(name).from_weight(w_OI).matmul(torch.randn(2, 70))
    assert torch.equal(w_OI, before)
    turned = w_OI.t().contiguous().t()  # the same values, columns together in memory
    assert torch.equal(storage(name).from_weight(turned).dense(), storage(name).from_weight(w_OI).dense())


@pytest.mark.parametrize("name", BASES)
def test_a_compiled_graph_decodes_without_a_break(name):
    base = make(name, 9, 70, torch.bfloat16)
    compiled = torch.compile(lambda x_TI: base.decode() @ x_TI.t(), fullgraph=True, backend="aot_eager")
    x_TI = torch.randn(3, 70).bfloat16()
    assert torch.equal(compiled(x_TI), base.decode() @ x_TI.t())


@pytest.mark.parametrize("name", BASES)
def test_every_storage_knows_its_name(name):
    assert storage(name).storage == name


@pytest.mark.parametrize("name", BASES)
def test_listing_the_table_imports_no_storage(name):
    assert BASES[name].startswith("veneer.bases.") and issubclass(storage(name), Base)
