"""The best approximation of a dense difference: the SVD's, exact or sketched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.lowrank import nearest

seeds, sides = st.integers(0, 2**31), st.integers(1, 24)
laws = settings(max_examples=30, deadline=None)


def difference(seed: int, outputs: int, inputs: int, decay: float = 0.0) -> torch.Tensor:
    """Gaussian, or with singular values k^-decay."""
    draw = torch.Generator().manual_seed(seed)
    d_OI = torch.randn(outputs, inputs, generator=draw)
    if not decay:
        return d_OI
    u, s, vt = torch.linalg.svd(d_OI, full_matrices=False)
    return (u * torch.arange(1, len(s) + 1) ** -decay) @ vt


@laws
@given(seed=seeds, outputs=sides, inputs=sides, rank=st.integers(1, 30))
def test_the_cut_is_the_best_one(seed, outputs, inputs, rank):
    d_OI = difference(seed, outputs, inputs)
    found, s = nearest(d_OI, rank), torch.linalg.svdvals(d_OI.double())
    assert found.a.shape == (min(rank, outputs, inputs), inputs) and found.b.shape[0] == outputs
    whole = float(d_OI.norm())
    assert found.whole == pytest.approx(whole)
    assert found.error == pytest.approx(float(s[rank:].norm()), abs=1e-5 * whole)
    assert float((d_OI - found.b @ found.a).norm()) == pytest.approx(found.error, abs=1e-5 * whole)
    torch.testing.assert_close(found.a @ found.a.mT, found.b.mT @ found.b, rtol=0, atol=1e-4 * whole)


@laws
@given(seed=seeds, outputs=sides, inputs=sides, energy=st.floats(0.01, 1))
def test_energy_takes_the_fewest_directions(seed, outputs, inputs, energy):
    d_OI = difference(seed, outputs, inputs)
    found = nearest(d_OI, energy=energy)
    share = torch.linalg.svdvals(d_OI.double()).square().cumsum(0) / float(d_OI.double().square().sum())
    count = len(found.a)
    assert found.kept >= energy - 1e-6 and float(share[count - 1]) >= energy - 1e-6
    assert count == 1 or float(share[count - 2]) < energy + 1e-6
    assert len(nearest(d_OI, rank=1, energy=energy).a) == 1


@pytest.mark.parametrize("decay", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("rank", [4, 40])
def test_a_sketch_leaves_out_hardly_more(decay, shape, rank):
    d_OI = difference(1, *shape, decay=decay)
    sketched, exact = nearest(d_OI, rank, sketch=True), nearest(d_OI, rank, sketch=False)
    assert exact.error < sketched.error < 1.01 * exact.error or sketched.error == pytest.approx(exact.error, rel=1e-5)
    assert float((d_OI - sketched.b @ sketched.a).norm()) == pytest.approx(sketched.error, rel=1e-4)
    again = nearest(d_OI, rank, sketch=True)
    assert torch.equal(again.a, sketched.a) and torch.equal(again.b, sketched.b)


def test_a_sketch_for_energy_grows_until_it_holds_enough():
    d_OI = difference(2, 1000, 600, decay=0.5)
    sketched, exact = nearest(d_OI, energy=0.67), nearest(d_OI, energy=0.67, sketch=False)
    assert 48 < len(exact.a) <= len(sketched.a) <= len(exact.a) + 1  # more than a first sketch has, and no more than 75
    assert sketched.kept >= 0.67


def test_a_product_of_low_rank_comes_back_without_directions_of_rounding():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 40, generator=draw), torch.randn(50, 3, generator=draw)
    for sketch in (False, True):
        found = nearest((b.double() @ a.double()).float(), 8, sketch=sketch)
        torch.testing.assert_close(found.b @ found.a, b @ a, rtol=1e-4, atol=1e-4)
        assert found.kept == pytest.approx(1)


def test_nothing_and_what_is_not_finite():
    found = nearest(torch.zeros(4, 6), 2)
    assert (found.a.shape, found.b.shape, found.kept, found.error) == ((0, 6), (4, 0), 1.0, 0.0)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            nearest(torch.full((4, 6), bad), 2)
