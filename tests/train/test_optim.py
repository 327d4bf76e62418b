"""One flat buffer behaves as the single tensors would."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.config import TrainSettings
from veneer.errors import ConfigError
from veneer.train import optim
from veneer.train.optim import OPTIMIZERS, FlatParameters, optimizer_state, restore_optimizer, set_rate, start_optimizer

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
    ours = start_optimizer(flat, settings)
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


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
# 96 x 64 is more than the 4,096 parameters under which bitsandbytes keeps 32 bits
BIG = [(96, 64), (8, 64)]
HERE = [
    "adamw",
    pytest.param("adamw_8bit", marks=needs_bitsandbytes),
    *(
        pytest.param(
            name,
            marks=[needs_bitsandbytes, pytest.mark.skipif(not torch.cuda.is_available(), reason="pages CUDA memory")],
        )
        for name in ("paged_adamw", "paged_adamw_8bit")
    ),
]


def _steps(flat: FlatParameters, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.param_groups[0]["lr"] = 0.1 / (seed + 1)
        for gradient, view in zip(_parameters(BIG, seed), flat_views(flat), strict=True):
            view.copy_(gradient.detach())
        optimizer.step()


def flat_views(flat: FlatParameters) -> list[torch.Tensor]:
    sizes = [rows * columns for rows, columns in BIG]
    return [part.view(shape) for part, shape in zip(flat.grads_P.split(sizes), BIG, strict=True)]


@pytest.mark.parametrize("name", HERE)
def test_an_optimizer_restored_takes_the_same_steps(name: str) -> None:
    settings = TrainSettings(optim=name, weight_decay=0.1)
    whole, cut = (FlatParameters(_parameters(BIG)) for _ in range(2))
    first, second = start_optimizer(whole, settings), start_optimizer(cut, settings)
    _steps(whole, first, range(1, 5))
    tensors, numbers = optimizer_state(first)
    tensors = {name: value.clone() for name, value in tensors.items()}
    values = whole.values_P.detach().clone()
    restore_optimizer(second, tensors, dict(numbers))
    cut.values_P.data.copy_(values)
    _steps(whole, first, range(5, 8))
    _steps(cut, second, range(5, 8))
    assert torch.equal(whole.values_P, cut.values_P)


def test_lora_plus_is_two_groups_of_rates() -> None:
    """A at the rate, all else at its multiple; a restored one goes on with the same steps."""
    shapes, settings = [(4, 8), (2, 8), (16, 4), (3,)], TrainSettings(loraplus_lr_ratio=16, weight_decay=0.1)
    parameters, single, later = (
        [
            nn.Parameter(p.detach().reshape(s))
            for p, s in zip(_parameters([(1, math.prod(s)) for s in shapes]), shapes, strict=True)
        ]
        for _ in range(3)
    )
    flat, again = FlatParameters(parameters, 2), FlatParameters(later, 2)
    ours, restored = start_optimizer(flat, settings), start_optimizer(again, settings)
    theirs = torch.optim.AdamW([{"params": single[:2]}, {"params": single[2:]}], weight_decay=0.1, foreach=False)
    for step in range(6):
        set_rate(ours, 0.01 / (step + 1))
        theirs.param_groups[0]["lr"], theirs.param_groups[1]["lr"] = 0.01 / (step + 1), 0.16 / (step + 1)
        for p, s in zip(parameters, single, strict=True):
            p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
            s.grad = p.grad.clone()
        if step == 3:
            tensors, numbers = optimizer_state(ours)
            restore_optimizer(restored, {name: value.clone() for name, value in tensors.items()}, dict(numbers))
            again.values_P.data.copy_(flat.values_P.data)
        if step >= 3:
            set_rate(restored, 0.01 / (step + 1))
            again.grads_P.copy_(flat.grads_P)
            restored.step()
        ours.step()
        theirs.step()
    assert torch.equal(flat.values_P, again.values_P)
    for p, s in zip(parameters, single, strict=True):
        torch.testing.assert_close(p, s, rtol=1e-5, atol=1e-6)


@needs_bitsandbytes
def test_moments_in_8_bits_are_8_bits_and_train_alike() -> None:
    flats = {name: FlatParameters(_parameters(BIG)) for name in ("adamw", "adamw_8bit")}
    for name, flat in flats.items():
        optimizer = start_optimizer(flat, TrainSettings(optim=name))
        _steps(flat, optimizer, range(1, 9))
        dtypes = {value.dtype for value in optimizer_state(optimizer)[0].values() if value.numel() == len(flat)}
        assert dtypes == {torch.uint8 if name == "adamw_8bit" else torch.float32}
    before = torch.cat([p.detach().reshape(-1) for p in _parameters(BIG)])
    moved = {name: flat.values_P.detach() - before for name, flat in flats.items()}
    # Codes of 8 bits are 1 to 2 % apart where moments are large, and coarser below: a few per cent of the way.
    apart = torch.linalg.vector_norm(moved["adamw"] - moved["adamw_8bit"])
    assert apart < 0.1 * torch.linalg.vector_norm(moved["adamw"])


def test_every_name_of_the_option_is_in_the_table() -> None:
    assert set(OPTIMIZERS) == set(TrainSettings.model_fields["optim"].annotation.__args__)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_torch_fused", "adamw"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("paged_adamw_32bit", "paged_adamw"),
        ("paged_adamw_8bit", "paged_adamw_8bit"),
    ],
)
def test_spellings_of_the_field(written: str, name: str) -> None:
    assert TrainSettings(optim=written).optim == name


def test_a_missing_package_says_how_to_install_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"adamw_8bit .*pip install bitsandbytes"):
        optim.check_optimizer("adamw_8bit")
    optim.check_optimizer("adamw")


@needs_bitsandbytes
def test_paging_needs_a_gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"paged_adamw_8bit pages memory of a CUDA GPU.*--optim adamw_8bit"):
        optim.check_optimizer("paged_adamw_8bit")
