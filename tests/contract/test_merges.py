"""The laws of MERGES, on one layer and on whole adapters.

At its neutral options A alone, and A beside zeros, give A. The order counts only where the method says so. How an
update is split into factors does not count. The same inputs give the same bytes, and are not changed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.adapter.card import Adapter, Card
from veneer.config.merging import SETTINGS
from veneer.errors import ConfigError
from veneer.merge.apply import combine
from veneer.merge.layer import merge_layer
from veneer.merge.method import Inputs, Parent
from veneer.merge.recipe import Recipe
from veneer.merge.table import MERGES, merge_named

MEMBERS = pytest.mark.parametrize("name", MERGES)
NEUTRAL = [name for name in MERGES if merge_named(name).neutral is not None]
UNORDERED = [name for name in MERGES if not merge_named(name).ordered]
ROUNDING = 1e-6  # float32 factors, a few products
laws = settings(max_examples=6, deadline=None)
seeds = st.integers(0, 2**31)


def parent(seed: int, outputs: int = 20, inputs: int = 16, rank: int = 3, weight: float = 1.0) -> Parent:
    """Singular values 4, 2, 1 times a random size, so that a stack of several has none that coincide."""
    draw = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(outputs, rank, generator=draw, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(inputs, rank, generator=draw, dtype=torch.float64))[0]
    s = torch.tensor([2.0**-k for k in range(rank)]) * (1 + torch.rand((), generator=draw).item())
    x = torch.randn(40, inputs, generator=draw, dtype=torch.float64) * torch.logspace(0, -1, inputs)
    read = Inputs(torch.eye(inputs, dtype=torch.float64), x.mT @ x / 40)
    return Parent((v * s).mT.float(), u.float(), weight, f"adapter {seed}", inputs=read)


def dense(found) -> torch.Tensor:
    return found.b.double() @ found.a.double()


def close(got: torch.Tensor, wanted: torch.Tensor, size: float = ROUNDING) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=size * float(wanted.norm()))


def refactored(given: Parent, seed: int) -> Parent:
    """The same update from other factors: one mixed, the directions of very different sizes."""
    rank = len(given.a)
    draw = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=torch.float64))[0]
    mix = mix * torch.tensor([10.0 ** (k - 1) for k in range(rank)])
    return replace(given, a=torch.linalg.inv(mix) @ given.a.double(), b=given.b.double() @ mix)


@pytest.mark.parametrize("name", NEUTRAL)
@laws
@given(seed=seeds, rank=st.integers(1, 4), zero_rank=st.integers(1, 5))
def test_one_adapter_and_one_beside_zeros_come_back(name, seed, rank, zero_rank):
    merge = merge_named(name)
    options = merge.settings(**merge.neutral)
    given = parent(seed, rank=rank)
    zeros = Parent(torch.randn(zero_rank, 16), torch.zeros(20, zero_rank), 1.0, "zeros")
    close(dense(merge_layer(merge, [given], options)), dense(given))
    for pair in ([given, zeros], [zeros, given], [given, replace(parent(seed + 1), weight=0.0)]):
        close(dense(merge_layer(merge, pair, options)), dense(given))


@pytest.mark.parametrize("name", UNORDERED)
@laws
@given(seed=seeds, order=st.permutations(range(3)), weights=st.lists(st.floats(0.2, 2), min_size=3, max_size=3))
def test_the_order_does_not_count(name, seed, order, weights):
    merge = merge_named(name)
    parents = [parent(seed + i, rank=i + 1, weight=weight) for i, weight in enumerate(weights)]
    one = merge_layer(merge, parents, merge.settings())
    other = merge_layer(merge, [parents[i] for i in order], merge.settings())
    # Element-wise choices between entries of equal size may fall either way: such entries weigh little.
    close(dense(other), dense(one), 1e-4)


def test_what_says_that_the_order_counts_means_it():
    ordered = set(MERGES) - set(UNORDERED)
    assert ordered == {"orthogonal"}
    for name in ordered:
        merge, parents = merge_named(name), [parent(0), parent(1)]
        one, other = (merge_layer(merge, found, merge.settings()) for found in (parents, parents[::-1]))
        assert float((dense(one) - dense(other)).norm()) > 0.1 * float(dense(one).norm())


@MEMBERS
@laws
@given(seed=seeds)
def test_the_factorisation_does_not_count(name, seed):
    merge = merge_named(name)
    parents = [parent(seed + i, weight=weight) for i, weight in enumerate((1.0, -0.5, 0.7))]
    one = merge_layer(merge, parents, merge.settings())
    other = merge_layer(merge, [refactored(p, seed + i) for i, p in enumerate(parents)], merge.settings())
    assert not one.degenerate
    close(dense(other), dense(one), 1e-4)


@MEMBERS
@pytest.mark.parametrize("exact", [False, True])
def test_same_bytes_again_and_inputs_untouched(name, exact):
    merge = merge_named(name)
    options = merge.settings(**({} if merge.stacked else {"exact": exact}))
    parents = [parent(i, rank=i + 1, weight=1.0 - 0.4 * i) for i in range(4)]
    before = [(p.a.clone(), p.b.clone()) for p in parents]
    one, other = merge_layer(merge, parents, options), merge_layer(merge, parents, options)
    assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
    assert one.a.dtype == one.b.dtype == torch.float32
    assert all(torch.equal(p.a, a) and torch.equal(p.b, b) for p, (a, b) in zip(parents, before, strict=True))


@pytest.mark.parametrize("name", [name for name in MERGES if not merge_named(name).stacked])
def test_the_fast_way_equals_the_exact_one(name):
    merge = merge_named(name)
    parents = [parent(i, weight=1.0 - 0.4 * i) for i in range(4)]
    fast, exact = (merge_layer(merge, parents, merge.settings(exact=exact)) for exact in (False, True))
    close(dense(fast), dense(exact), 1e-5)


@pytest.mark.parametrize("name", [name for name in MERGES if not merge_named(name).stacked])
@laws
@given(seed=seeds, rank=st.integers(1, 6), energy=st.sampled_from([None, 0.5, 0.9]), scale=st.sampled_from([1.0, -0.5]))
def test_rank_energy_and_scale_mean_the_same_for_all(name, seed, rank, energy, scale):
    merge = merge_named(name)
    parents = [parent(seed + i) for i in range(3)]
    found = merge_layer(merge, parents, merge.settings(rank=rank, energy=energy, scale=scale))
    assert len(found.a) <= rank
    assert found.norm == pytest.approx(float(dense(found).norm()), rel=1e-5)
    assert found.kept == pytest.approx(found.norm**2 / (found.norm**2 + found.error**2), rel=1e-5)
    unscaled = merge_layer(merge, parents, merge.settings(rank=rank, energy=energy))
    close(dense(found), scale * dense(unscaled))


@MEMBERS
def test_parents_that_hold_or_leave_nothing_give_zeros(name):
    merge, one = merge_named(name), parent(0)
    cancelled = Parent(torch.cat([one.a, one.a]), torch.cat([one.b, -one.b], 1), 1.0, "cancelled", inputs=one.inputs)
    zeros = replace(one, b=torch.zeros_like(one.b))
    for parents in ([zeros], [zeros, zeros], [replace(one, weight=0.0)], [cancelled]):
        found = merge_layer(merge, parents, merge.settings())
        assert found.a.shape[1] == 16 and found.b.shape[0] == 20 and len(found.a) >= 1
        assert float(dense(found).norm()) < 1e-12
        assert found.kept == 1.0 and found.error == 0.0


@MEMBERS
def test_values_that_are_not_finite_are_refused(name):
    merge, one = merge_named(name), parent(0)
    for bad in (torch.full_like(one.a, torch.nan), torch.full_like(one.a, torch.inf)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            merge_layer(merge, [one, replace(one, a=bad)], merge.settings())


@MEMBERS
def test_equal_singular_values_are_told_where_they_matter(name):
    """Two updates of equal size in orthogonal directions: a shared basis of theirs is arbitrary."""
    eye = torch.eye(8)
    read = Inputs(eye.double(), eye.double())
    parents = [Parent(eye[i : i + 2], eye[:, i : i + 2], 1.0, str(i), inputs=read) for i in (0, 2)]
    found = merge_layer(merge_named(name), parents, merge_named(name).settings())
    on_a_basis = {"magnitude", "ties", "dare_linear", "dare_ties", "knots", "core"}
    at_the_cut = {"svd", "compress"}
    assert found.degenerate == (name in on_a_basis | at_the_cut)


def adapter(seed: int, layers: int = 2, **card) -> Adapter:
    tensors, ranks = {}, {}
    for layer in range(layers):
        one = parent(100 * seed + layer)
        tensors |= {f"model.layers.{layer}.up_proj.a": one.a, f"model.layers.{layer}.up_proj.b": one.b}
        ranks[f"model.layers.{layer}.up_proj"] = len(one.a)
    return Adapter(tensors, Card("lora", {}, dict.fromkeys(ranks, 1.0), ranks, **card))


@pytest.mark.parametrize("name", [name for name in MERGES if not SETTINGS[name].reads_data])
def test_whole_adapters_in_another_order_are_equal_to_the_bit(name):
    given = [adapter(0), adapter(1, layers=3), adapter(2, layers=1)]
    weights, order = (0.5, -1.0, 0.25), (2, 0, 1)
    one, report = combine(given, Recipe(name, weights))
    other, _ = combine([given[i] for i in order], Recipe(name, tuple(weights[i] for i in order)))
    assert (one.identity == other.identity) == (name in UNORDERED)
    assert len(one.modules()) == 3
    assert one.card.parents == tuple(found.identity for found in given) == report.parents
    assert Recipe.from_json(one.card.training["merge"]).settings == Recipe(name, weights).settings


def test_the_table_of_settings_is_that_of_the_methods():
    assert {name: merge_named(name).settings for name in MERGES} == SETTINGS
    assert {name: merge_named(name).learn is not None for name in MERGES} == {
        name: settings.reads_data for name, settings in SETTINGS.items()
    }


@pytest.mark.parametrize("name", [name for name in MERGES if SETTINGS[name].reads_data])
def test_a_method_that_reads_data_needs_some(name):
    with pytest.raises(ConfigError, match=f"{name} reads data: give --dataset"):
        combine([adapter(0), adapter(1)], Recipe(name, (1.0, 1.0)))


def test_an_unknown_method_or_option_is_named():
    with pytest.raises(ConfigError, match="did you mean ties"):
        merge_named("tiess")
    with pytest.raises(ConfigError, match="denstiy"):
        Recipe("ties", (1.0,), {"denstiy": 0.5})
    with pytest.raises(ConfigError, match="rank"):
        Recipe("cat", (1.0,), {"rank": 4})
    for weights in ((), (float("nan"),), (1.0, float("inf")), (True,), ("1",)):
        with pytest.raises(ConfigError, match="weights"):
            Recipe("linear", weights)
