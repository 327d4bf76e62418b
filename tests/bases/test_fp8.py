"""The e4m3 storage on the CPU: its error, its second copy, and the product of both sides with the hardware stood in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from veneer.bases import fp8
from veneer.bases.fp8 import FP8, fp8_supported


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch) -> list[tuple[Any, ...]]:
    """As if this machine multiplied e4m3 matrices: what the hardware is given, and the product in float32."""
    made: list[tuple[Any, ...]] = []

    def product(a, b, scale_a, scale_b, *, out_dtype, use_fast_accum):
        assert a.is_contiguous() and b.t().is_contiguous() and a.dtype == b.dtype == torch.float8_e4m3fn
        assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1]) and use_fast_accum
        made.append((a, b))
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(fp8, "fp8_supported", lambda device: True)
    return made


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def test_a_cpu_does_not_multiply_e4m3():
    assert not fp8_supported("cpu") and not fp8_supported(torch.device("meta"))


def test_both_products_with_the_hardware(calls):
    w_OI, x_TI, g_TO = gaussian(32, 48), gaussian(5, 48, seed=1), gaussian(5, 32, seed=2)
    base = FP8.from_weight(w_OI)
    # Each side of a product is off by 0.026 of its size, the two together by √2 times that.
    assert relative(base.matmul(x_TI), x_TI @ w_OI.t()) < 0.05
    assert len(calls) == 1
    assert relative(base.matmul_t(g_TO), g_TO @ base.dense()) < 1e-6  # no second copy: W is decoded
    assert len(calls) == 1
    base.add_transposed(w_OI)
    assert relative(base.matmul_t(g_TO), g_TO @ w_OI) < 0.05
    assert len(calls) == 2
    into_TI = torch.ones(5, 48)
    assert base.matmul_t(g_TO, into_TI) is into_TI
    assert torch.equal(into_TI, base.matmul_t(g_TO) + 1)


@pytest.mark.parametrize("shape", [(0, 48, 32), (5, 48, 33), (5, 47, 32)])
def test_what_does_not_fit_the_hardware_is_decoded(calls, shape):
    tokens, inside, outside = shape
    base, x_TI = FP8.from_weight(gaussian(outside, inside)), gaussian(tokens, inside, seed=1)
    base.add_transposed()
    torch.testing.assert_close(base.matmul(x_TI), x_TI @ base.dense().t())
    torch.testing.assert_close(
        base.matmul_t(x_TI.new_ones(tokens, outside)), torch.ones(tokens, outside) @ base.dense()
    )
    assert not calls


@pytest.mark.parametrize("given", [False, True])
def test_the_second_copy_is_rebuilt_not_saved(given):
    w_OI = gaussian(32, 48)
    base = FP8.from_weight(w_OI)
    keys = base.state_dict().keys()
    base.add_transposed(w_OI if given else None)
    assert base.state_dict().keys() == keys == {"weight", "weight.scale"}
    assert base.weight_t.shape == (48, 32) and base.scale_t.shape == (48,) and not base.weight_t.requires_grad
    copy_OI = (base.weight_t.float() * base.scale_t.unsqueeze(1)).t()
    assert relative(copy_OI, w_OI) < (0.028 if given else 0.040)  # of the weight itself, or rounded twice
    base.load_state_dict(FP8.from_weight(w_OI * 2).state_dict())
    assert base.weight_t is None and base.scale_t is None  # it was another weight's


def test_the_second_copy_moves_and_is_left_alone_by_casts():
    base = FP8.from_weight(gaussian(16, 16))
    base.add_transposed()
    held = base.weight_t.view(torch.uint8).clone()
    base.bfloat16()
    assert base.weight_t.dtype == torch.float8_e4m3fn and torch.equal(base.weight_t.view(torch.uint8), held)
    assert base.scale_t.dtype == torch.float32
    assert base.to("meta").weight_t.is_meta
