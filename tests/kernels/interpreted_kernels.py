"""Triton kernels on CPU tensors in Triton's interpreter; `test_interpreted.py` runs this file with it switched on.

What is written to is filled with NaN (or the byte 255) before, and has room behind it that must stay as it was.
The interpreter cuts off where a GPU rounds in casts to bfloat16 and e4m3: those are compared before the cast, or to one
step; tests/gpu/test_kernels_cuda.py compares them to the bit.
"""

from __future__ import annotations

import math

import pytest
import torch

from veneer.kernels import swiglu_triton, thin_triton
from veneer.kernels.dequantise import dequantise_4bit
from veneer.kernels.fourbit import LEVELS, quantise_4bit
from veneer.kernels.fourbit_triton import PAIRS_A_PROGRAM, dequantise_4bit_triton
from veneer.kernels.nested import Nested, quantise_absmax
from veneer.kernels.rowwise import (
    E4M3_MAX,
    LEAST,
    dequantise_rows,
    quantise_rows_fp8_reference,
    quantise_rows_int8,
)
from veneer.kernels.rowwise_triton import dequantise_rows_triton, quantise_rows_fp8_triton

BEHIND = 70  # elements behind an output
# Odd counts, short last blocks, one program exactly, one more, and more than 256 blocks, so that two nested ones.
SHAPES = [(1, 1), (3, 3), (5, 7), (64, 64), (1, 2 * PAIRS_A_PROGRAM), (1, 2 * PAIRS_A_PROGRAM + 1), (130, 257)]


def poisoned(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory full of NaN, and its beginning in this shape."""
    memory = torch.full((math.prod(shape) + BEHIND,), float("nan"), dtype=dtype)
    return memory, memory[: math.prod(shape)].view(shape)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_4bit_weights_decode_as_in_the_reference(levels, double, shape, dtype):
    packed, absmax_K = quantise_4bit(torch.randn(shape), levels)
    nested: Nested | None = None
    if double:
        absmax_K, nested = quantise_absmax(absmax_K)
    memory, out = poisoned(*shape, dtype=dtype)
    got = dequantise_4bit_triton(packed, absmax_K, shape, dtype, levels, nested, out)
    wanted = dequantise_4bit(packed, absmax_K, shape, dtype, levels, nested)
    step = 2**-7 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(got.float(), wanted.float(), rtol=step, atol=0)
    assert memory[-BEHIND:].isnan().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 64), (2, 100), (5, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("encode", [quantise_rows_int8, quantise_rows_fp8_reference])
def test_rows_decode_as_in_the_reference(shape, dtype, encode):
    codes, scale = encode(torch.randn(shape))
    memory, out = poisoned(*shape, dtype=dtype)
    got = dequantise_rows_triton(codes, scale.view(-1), dtype, out, at_once=32)
    assert torch.equal(got, dequantise_rows(codes, scale.view(-1), dtype))
    assert memory[-BEHIND:].isnan().all()


@pytest.mark.parametrize("at_once", [8, 32, 1 << 15])  # rows in one piece and in several
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 64), (2, 100), (5, 33), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activations_are_scaled_as_in_the_reference(at_once, shape, dtype):
    """Written as float32: what the cast to e4m3 gets."""
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[0]).unsqueeze(1)).to(dtype)
    x[1:2] = 0
    memory, codes = poisoned(*shape, dtype=torch.float32)
    scale_memory, scale = poisoned(shape[0], 1, dtype=torch.float32)
    quantise_rows_fp8_triton(x, (codes, scale), at_once)
    absmax = x.float().abs().amax(1, keepdim=True).clamp(min=LEAST)
    assert torch.equal(scale, quantise_rows_fp8_reference(x)[1])
    assert torch.equal(codes, (x.float() * (E4M3_MAX / absmax)).clamp(-E4M3_MAX, E4M3_MAX))
    assert memory[-BEHIND:].isnan().all() and scale_memory[-BEHIND:].isnan().all()


def test_rows_may_lie_apart_in_memory():
    x = torch.randn(6, 40)
    for view in (x[::2], x[:, 3:20], x.t()):
        _, codes = poisoned(*view.shape, dtype=torch.float32)
        _, scale = poisoned(len(view), 1, dtype=torch.float32)
        quantise_rows_fp8_triton(view, (codes, scale))
        torch.testing.assert_close(codes * scale, view, rtol=2**-22, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, of which the interpreter is made, warns of NaN
@pytest.mark.parametrize("at_once", [4, 1 << 15])
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not(at_once, fault):
    x = torch.randn(3, 10)
    x[1, 7] = fault
    _, codes = poisoned(3, 10, dtype=torch.float32)
    _, scale = poisoned(3, 1, dtype=torch.float32)
    quantise_rows_fp8_triton(x, (codes, scale), at_once)
    assert scale.isnan().view(-1).tolist() == [False, True, False]
    assert codes[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (64, 64, 16), (100, 130, 8), (33, 257, 20)])
def test_both_thin_products_are_those_of_float64(shape, monkeypatch):
    for name, value in {
        "ROWS": 16,
        "COLUMNS": 32,
        "PROGRAMS": 6,
    }.items():  # several rectangles each way, short last ones
        monkeypatch.setattr(thin_triton, name, value)
    tokens, out, rank = shape
    g, z, b = torch.randn(tokens, out + 3), torch.randn(tokens, 2 * rank), torch.randn(out, rank)
    g[:, out:], z[:, :rank] = torch.nan, torch.nan  # what a wrong stride would read
    g, z = g[:, :out], z[:, rank:]
    dz, db = thin_triton.thin_gradients(g, z, b, torch.float32)
    for got, wanted in ((dz, g.double() @ b.double()), (db, g.double().t() @ z.double())):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6 * (max(tokens, out) + 10))  # float32 sums


@pytest.mark.parametrize("ranks", [(3, 3, 3), (16, 8, 20)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 32), (40, 70)])
def test_swiglu_with_lora_around_it(shape, ranks, monkeypatch):
    """In float32, against the reference in float64: g and u may lie apart in memory, and what is beside is not read."""
    for name, value in {"ROWS": 16, "COLUMNS": 32, "PROGRAMS": 4}.items():  # several rectangles, short last ones
        monkeypatch.setattr(swiglu_triton, name, value)
    tokens, width = shape
    both, z = torch.randn(tokens, 2 * width), torch.randn(tokens, ranks[0] + ranks[1])
    g, u = both.split(width, 1)
    zs, bs = z.split(ranks[:2], 1), [torch.randn(width, rank) for rank in ranks[:2]]
    a, dz = torch.randn(ranks[2], width), torch.randn(tokens, ranks[2])
    memory, dh = poisoned(tokens, width, dtype=torch.float32)
    dh.normal_()
    wanted = swiglu_float64(*(part.double() for part in (g, u, *zs, *bs, a, dh, dz)))
    h = swiglu_triton.swiglu(g, u, zs, bs)
    found = swiglu_triton.swiglu_backward(dh, g, u, zs, dz, bs, a)
    assert found[0].data_ptr() == dh.data_ptr() and memory[-BEHIND:].isnan().all()
    for one, other in zip((h, *found), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max() + 1))


def swiglu_float64(g, u, z_g, z_u, b_g, b_u, a, dh, dz):
    """By autograd in float64."""
    g, u = g.requires_grad_(), u.requires_grad_()
    h = torch.nn.functional.silu(g + z_g @ b_g.t()) * (u + z_u @ b_u.t())
    dg, du = torch.autograd.grad((h * (dh + dz @ a)).sum(), (g, u))
    return h.detach(), dg, du, h.detach()
