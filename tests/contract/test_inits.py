"""The laws of INITS: starts as the base, a pure function of the generator, at the spread that its source gives.

Legend: I in, O out, R rank.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.bases.dense import Dense
from veneer.methods.anchored import AnchoredLoRA
from veneer.methods.init import INITS

# name -> standard deviation of A's entries. Kaiming with a = √5 is U(±1/√I), so 1/√(3I); Gaussian, in PEFT, 1/r.
SPREAD = {
    "kaiming": lambda inside, rank: 1 / math.sqrt(3 * inside),
    "gaussian": lambda inside, rank: 1 / rank,
}


ANCHORED = [name for name, made in INITS.items() if made.anchored]
RANDOM = [name for name in INITS if name not in ANCHORED]


def start(name: str, outside: int, inside: int, rank: int, seed: int = 0, scale: float = 2.0):
    weight_OI = torch.randn(outside, inside, generator=torch.Generator().manual_seed(77))
    return INITS[name].factors(weight_OI, rank, scale, torch.Generator().manual_seed(seed))


def test_every_start_has_its_spread_here():
    assert set(SPREAD) == set(RANDOM)


@pytest.mark.parametrize("name", RANDOM)
@given(outside=st.integers(1, 40), inside=st.integers(1, 40), rank=st.integers(1, 20), seed=st.integers(0, 999))
def test_it_starts_as_the_base_with_gradients_to_come(name, outside, inside, rank, seed):
    """B A = 0, and one of the two is not 0: else neither would ever get a gradient."""
    a_RI, b_OR = start(name, outside, inside, rank, seed)
    assert a_RI.shape == (rank, inside) and b_OR.shape == (outside, rank)
    assert a_RI.dtype == b_OR.dtype == torch.float32
    assert not (b_OR @ a_RI).any()
    assert a_RI.all() or b_OR.all()


@pytest.mark.parametrize("name", RANDOM)
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
    if name in RANDOM:
        assert not torch.equal(first[0], start(name, 5, 6, 3, seed=5)[0])


@pytest.mark.parametrize("name", INITS)
def test_the_weight_is_left_alone(name):
    weight_OI = torch.ones(5, 6, dtype=torch.bfloat16)
    INITS[name].factors(weight_OI, 2, 2.0, torch.Generator())
    assert torch.equal(weight_OI, torch.ones(5, 6, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ANCHORED)
@given(outside=st.integers(6, 30), inside=st.integers(6, 30), rank=st.integers(1, 6), scale=st.sampled_from([0.5, 2.0]))
def test_an_anchored_start_is_the_base_to_the_bit(name, outside, inside, rank, scale):
    base = Dense.from_weight(torch.randn(outside, inside, generator=torch.Generator().manual_seed(outside)))
    a_RI, b_OR = INITS[name].factors(base.weight, rank, scale, torch.Generator().manual_seed(0))
    method, x_TI = AnchoredLoRA(a_RI, b_OR, scale), torch.randn(5, inside)
    assert a_RI.shape == (rank, inside) and b_OR.shape == (outside, rank) and (b_OR @ a_RI).any()
    assert not method.delta(x_TI, base.matmul(x_TI), base).any()
    assert torch.equal(method.merged(base), base.dense())


def test_pissa_and_milora_take_the_ends_of_the_spectrum():
    """Their products have the largest and the smallest singular values of W, and its directions: W less them is W
    without those. 1e-5: float32 SVDs of a matrix of norm 13."""
    weight_OI = torch.randn(12, 14, generator=torch.Generator().manual_seed(0))
    wanted = torch.linalg.svdvals(weight_OI)
    for name, kept in (("pissa", wanted[4:]), ("milora", wanted[:-4])):
        a_RI, b_OR = INITS[name].factors(weight_OI, 4, 2.0, torch.Generator())
        rest = torch.linalg.svdvals(weight_OI - 2.0 * b_OR @ a_RI)
        torch.testing.assert_close(rest[: len(kept)], kept, rtol=0, atol=1e-5)
        assert rest[len(kept) :].max() < 1e-5


def test_the_randomised_start_is_the_exact_one_where_the_spectrum_falls():
    u, v = (torch.linalg.qr(torch.randn(size, 40))[0] for size in (60, 50))
    weight_OI = (u * 0.7 ** torch.arange(40.0)) @ v.t()
    exact, fast = (INITS[name].factors(weight_OI, 8, 1.0, torch.Generator()) for name in ("pissa", "pissa_niter_16"))
    torch.testing.assert_close(fast[1] @ fast[0], exact[1] @ exact[0], rtol=0, atol=1e-5)


def test_olora_begins_a_qr():
    weight_OI = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    q, r = torch.linalg.qr(weight_OI)
    a_RI, b_OR = INITS["olora"].factors(weight_OI, 3, 2.0, torch.Generator())
    torch.testing.assert_close(b_OR @ a_RI, q[:, :3] @ r[:3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ANCHORED)
def test_a_rank_that_the_weight_does_not_have_is_an_error(name):
    with pytest.raises(ValueError, match=r"rank 7 needs .* got \(5, 9\)"):
        start(name, 5, 9, 7)
