"""One flat buffer behaves as the single tensors would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.config import TrainSettings
from veneer.train.optim import FlatParameters, adamw

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


def _parameters(shapes: list[tuple[int, int]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@given(SHAPES)
def test_parameters_and_gradients_are_views(shapes: list[tuple[int, int]]) -> None:
    parameters, before = _parameters(shapes), _parameters(shapes)
    flat = FlatParameters(parameters)
    assert len(flat) == sum(rows * columns for rows, columns in shapes)
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter, old)
    sum((2.0 * p).sum() for p in parameters).backward()
    assert torch.equal(flat.grads_P, torch.full_like(flat.grads_P, 2.0))
    flat.values_P.data.fill_(7.0)
    assert all(bool((p == 7.0).all()) for p in parameters)


@given(SHAPES, st.floats(0.01, 10.0))
def test_clip_is_that_of_the_single_tensors(shapes: list[tuple[int, int]], max_norm: float) -> None:
    parameters, single = _parameters(shapes), _parameters(shapes)
    flat = FlatParameters(parameters)
    for p, s in zip(parameters, single, strict=True):
        p.grad.copy_(3.0 * p.detach())
        s.grad = 3.0 * s.detach()
    wanted = torch.nn.utils.clip_grad_norm_(single, max_norm)
    # Norm of norms against one norm: the sums are taken in another order.
    torch.testing.assert_close(flat.clip(max_norm), wanted)
    torch.testing.assert_close(flat.grads_P, torch.cat([s.grad.reshape(-1) for s in single]))


def test_a_max_norm_of_zero_never_clips() -> None:
    (parameter,) = parameters = _parameters([(3, 3)])
    flat = FlatParameters(parameters)
    parameter.grad.fill_(100.0)
    assert flat.clip(0.0) == pytest.approx(300.0)
    assert bool((flat.grads_P == 100.0).all())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_that_of_the_single_tensors(weight_decay: float) -> None:
    shapes = [(4, 8), (16, 4), (1, 3)]
    parameters, single = _parameters(shapes), _parameters(shapes)
    settings = TrainSettings(weight_decay=weight_decay, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    flat = FlatParameters(parameters)
    ours = adamw(flat, settings)
    theirs = torch.optim.AdamW(single, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, foreach=False)
    for step in range(8):
        rate = 0.1 / (step + 1)
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = rate
        gradients = _parameters(shapes, seed=step + 1)
        for p, s, g in zip(parameters, single, gradients, strict=True):
            p.grad.copy_(g.detach())
            s.grad = g.detach().clone()
        ours.step()
        theirs.step()
    for p, s in zip(parameters, single, strict=True):  # the fused kernel rounds in another order than the plain one
        torch.testing.assert_close(p, s, rtol=1e-5, atol=1e-6)
