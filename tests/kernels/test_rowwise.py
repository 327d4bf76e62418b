"""Rows of 8 bits: codes by their definition, scales, saturation, and rows that hold NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.kernels import rowwise
from veneer.kernels.rowwise import (
    E4M3,
    dequantise_rows,
    quantise_rows_fp8,
    quantise_rows_fp8_reference,
    quantise_rows_int8,
)

shapes = {"rows": st.integers(0, 20), "columns": st.integers(1, 40), "seed": st.integers(0, 999)}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(**shapes)
def test_int8_codes_are_the_nearest(rows, columns, seed):
    w = gaussian(rows, columns, seed=seed)
    codes, absmax = quantise_rows_int8(w)
    assert codes.dtype == torch.int8 and torch.equal(absmax, w.abs().amax(1))
    steps = w.double() * 127 / absmax.double().unsqueeze(1)
    assert ((codes.double() - steps).abs() <= 0.5 + 1e-4).all()


@given(**shapes)
def test_e4m3_keeps_three_bits_of_mantissa(rows, columns, seed):
    x = gaussian(rows, columns, seed=seed)
    before = x.clone()
    codes, scale = quantise_rows_fp8_reference(x)
    assert torch.equal(x, before)  # read, never written to
    assert codes.dtype == E4M3 and scale.shape == (rows, 1) and scale.dtype == torch.float32
    assert ((codes.float().abs().amax(1) == 448) | (x == 0).all(1)).all()
    error = (codes.double() * scale.double() - x.double()).abs()
    assert (error <= 2**-4 * 1.001 * x.double().abs() + 2**-10 * scale.double()).all()  # half a step; below: denormals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(**shapes)
def test_decoding_is_code_times_scale_rounded_once(dtype, rows, columns, seed):
    w = gaussian(rows, columns, seed=seed)
    for codes, scale in (quantise_rows_int8(w), quantise_rows_fp8_reference(w)):
        scale = scale.view(-1)
        got = dequantise_rows(codes, scale, dtype)
        assert got.dtype == dtype and torch.equal(got, (codes.float() * scale.unsqueeze(1)).to(dtype))


def test_all_256_codes_of_e4m3_decode_on_the_cpu():
    codes = torch.arange(256, dtype=torch.uint8).view(1, -1).view(E4M3)
    got = dequantise_rows(codes, torch.ones(1), torch.float32)
    torch.testing.assert_close(got, codes.float(), rtol=0, atol=0, equal_nan=True)


def test_pieces_make_no_difference(monkeypatch):
    w = gaussian(13, 7)
    whole = (*quantise_rows_int8(w), *quantise_rows_fp8_reference(w))
    decoded = dequantise_rows(*whole[:2], torch.bfloat16)
    monkeypatch.setitem(rowwise.AT_ONCE, "cpu", 14)
    pieces = (*quantise_rows_int8(w), *quantise_rows_fp8_reference(w))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, pieces, strict=True))
    assert torch.equal(dequantise_rows(*whole[:2], torch.bfloat16), decoded)


def test_rows_of_zeros():
    w = torch.zeros(2, 5)
    for codes, scale in (quantise_rows_int8(w), quantise_rows_fp8(w)):
        assert torch.equal(dequantise_rows(codes, scale.view(-1), torch.float32), w)


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not(fault):
    x = gaussian(3, 8)
    x[1, 3] = fault
    codes, scale = quantise_rows_fp8(x)
    assert scale.isnan().view(-1).tolist() == [False, True, False]
    assert codes.float()[[0, 2]].isfinite().all()


def test_the_operation_is_registered_soundly():
    torch.library.opcheck(torch.ops.veneer.quantise_rows_fp8.default, (gaussian(3, 16),))
