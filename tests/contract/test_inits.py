"""The laws of INITS: starts as the base, a pure function of the generator, at the spread that its source gives.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.methods.init import INITS

# name -> standard deviation of A's entries. Kaiming with a = √5 is U(±1/√I), so 1/√(3I); Gaussian, in PEFT, 1/r.
SPREAD = {
    "kaiming": lambda inside, rank: 1 / math.sqrt(3 * inside),
    "gaussian": lambda inside, rank: 1 / rank,
}


def start(name: str, outside: int, inside: int, rank: int, seed: int = 0):
    weight_OI = torch.ones(outside, inside)
    return INITS[name](weight_OI, rank, torch.Generator().manual_seed(seed))


def test_every_start_has_its_spread_here():
    assert set(SPREAD) == set(INITS)


@pytest.mark.parametrize("name", INITS)
@given(outside=st.integers(1, 40), inside=st.integers(1, 40), rank=st.integers(1, 20), seed=st.integers(0, 999))
def test_it_starts_as_the_base_with_gradients_to_come(name, outside, inside, rank, seed):
    """B A = 0, and one of the two is not 0: else neither would ever get a gradient."""
    a_RI, b_OR = start(name, outside, inside, rank, seed)
    assert a_RI.shape == (rank, inside) and b_OR.shape == (outside, rank)
    assert a_RI.dtype == b_OR.dtype == torch.float32
    assert not (b_OR @ a_RI).any()
    assert a_RI.all() or b_OR.all()


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("inside, rank", [(64, 128), (1024, 8)])
def test_the_spread_is_that_of_its_source(name, inside, rank):
    a_RI, _ = start(name, 4, inside, rank)
    n, wanted = a_RI.numel(), SPREAD[name](inside, rank)
    assert abs(a_RI.mean().item()) < 5 * wanted / math.sqrt(n)
    assert abs(a_RI.std().item() / wanted - 1) < 5 / math.sqrt(2 * n)


def test_kaiming_is_torchs_own():
    """nn.Linear's and PEFT's kaiming_uniform with a = √5: the same bound, so the same distribution."""
    a_RI, _ = start("kaiming", 4, 100, 50)
    wanted = torch.empty(50, 100)
    torch.nn.init.kaiming_uniform_(wanted, a=math.sqrt(5))
    bound = 1 / math.sqrt(100)
    assert a_RI.abs().max() <= bound and wanted.abs().max() <= bound
    assert a_RI.abs().max() > 0.99 * bound


@pytest.mark.parametrize("name", INITS)
def test_it_is_a_function_of_its_generator_alone(name):
    before = torch.random.get_rng_state()
    first = start(name, 5, 6, 3, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    again = start(name, 5, 6, 3, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], start(name, 5, 6, 3, seed=5)[0])


@pytest.mark.parametrize("name", INITS)
def test_the_weight_is_left_alone(name):
    weight_OI = torch.ones(5, 6, dtype=torch.bfloat16)
    INITS[name](weight_OI, 2, torch.Generator())
    assert torch.equal(weight_OI, torch.ones(5, 6, dtype=torch.bfloat16))
