"""Methods that read data: what they gather on a model, and what they make of it on one layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.test_merges import close, dense, parent, seeds
from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.config.merging import RegmeanSettings
from veneer.data.examples import Example
from veneer.errors import ConfigError, ModelError
from veneer.lowrank import truncate
from veneer.lowrank.aware import reading_basis, truncate_aware
from veneer.merge.apply import combine
from veneer.merge.inputs import gather
from veneer.merge.layer import merge_layer
from veneer.merge.lora_soups import backward, scaled
from veneer.merge.lorahub import searched
from veneer.merge.method import Inputs, Parent
from veneer.merge.on_base import OnBase
from veneer.merge.recipe import Recipe
from veneer.merge.regmean import REGMEAN
from veneer.merge.rows_loss import batches_of, mean_loss
from veneer.model.load import Loaded
from veneer.model.losses import sequence_nll
from veneer.model.packed import speaking

pytestmark = pytest.mark.filterwarnings("ignore::veneer.notes.Note")  # pico comes from memory: its base is unverified
laws = settings(max_examples=6, deadline=None)


def strange(adapter: Adapter, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    noise = {
        n: v if n.endswith(".a") else 0.3 * torch.randn(v.shape, generator=draw) for n, v in adapter.tensors.items()
    }
    return Adapter(noise, adapter.card)


@pytest.fixture
def adapters(pico: Any) -> list[Adapter]:
    made = []
    for seed, targets in enumerate((["q_proj", "down_proj"], ["q_proj", "v_proj"])):
        attach(pico, LoraSettings(r=2 + seed, target_modules=targets), f"new{seed}", seed=seed)
        made.append(strange(take(pico, f"new{seed}"), seed))
    return made


@pytest.fixture
def on_base(pico: Any, adapters: list[Adapter]) -> OnBase:
    """Both adapters on the model, five rows for one and four for the other."""
    draw = torch.Generator().manual_seed(3)
    examples = {}
    for slot, adapter, count in zip("xy", adapters, (5, 4), strict=True):
        attach(pico, adapter, slot)
        ids = [tuple(torch.randint(3, 96, (4 + n,), generator=draw).tolist()) for n in range(count)]
        examples[slot] = [Example(row, (False, *[True] * (len(row) - 1)), n, 0) for n, row in enumerate(ids)]
    loaded = Loaded(pico, None, None, "pico", "dense float32")  # type: ignore[arg-type]
    return OnBase(loaded, ("x", "y"), examples)


def test_grams_are_those_of_ordinary_calls(pico: Any, on_base: OnBase) -> None:
    """Packed rows in a basis, and each row alone in full."""
    path = "model.layers.1.self_attn.q_proj"
    basis = torch.linalg.qr(torch.randn(32, 5, generator=torch.Generator().manual_seed(0)).double())[0]
    got = gather(on_base, {path: basis}, progress=False)
    for slot, examples in on_base.examples.items():
        fed: list[torch.Tensor] = []
        hook = pico.get_submodule(path).register_forward_pre_hook(lambda _, x, fed=fed: fed.append(x[0][0].double()))
        with torch.no_grad(), speaking(pico, slot):
            for one in examples:
                pico(torch.tensor([one.input_ids]))
        hook.remove()
        q = torch.cat(fed) @ basis
        torch.testing.assert_close(got[slot][path], q.mT @ q / len(q), rtol=1e-4, atol=1e-6)
    assert not pico.get_submodule(path)._forward_pre_hooks


@laws
@given(seed=seeds, weights=st.lists(st.floats(0.2, 2), min_size=3, max_size=3))
def test_regmean_of_equal_inputs_is_the_weighted_mean(seed: int, weights: list[float]) -> None:
    read = parent(seed).inputs
    parents = [replace(parent(seed + i, rank=i + 1, weight=w), inputs=read) for i, w in enumerate(weights)]
    mean = torch.stack([w * dense(one) for one, w in zip(parents, weights, strict=True)]).sum(0) / sum(weights)
    close(dense(merge_layer(REGMEAN, parents, RegmeanSettings())), mean)


@laws
@given(seed=seeds, weights=st.lists(st.sampled_from([-1.0, 0.5, 2.0]), min_size=3, max_size=3))
def test_regmean_is_the_least_squares_update(seed: int, weights: list[float]) -> None:
    """Any step away from it, within what the parents read, costs; and the mean of the updates costs more."""
    parents = [parent(seed + i, weight=w) for i, w in enumerate(weights)]
    found = dense(merge_layer(REGMEAN, parents, RegmeanSettings(ridge=1e-9)))

    def cost(dw: torch.Tensor) -> float:
        total = 0.0
        for one in parents:
            gap = dw - (1 if one.weight > 0 else -1) * dense(one)
            total += abs(one.weight) * float((gap @ one.inputs.gram_KK * gap).sum())
        return total

    least, basis = cost(found), reading_basis(torch.cat([one.a for one in parents]))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(5):
        step = torch.randn(20, basis.shape[1], generator=draw, dtype=torch.float64) @ basis.mT
        assert cost(found + 1e-2 * step) > least
    mean = sum(one.weight * dense(one) for one in parents) / sum(abs(one.weight) for one in parents)
    assert cost(mean) > least * (1 + 1e-9)


def test_regmean_comes_nearer_to_the_parents_outputs_than_the_mean(on_base: OnBase, adapters: list[Adapter]) -> None:
    """On a whole model: over all layers that both have, the squared distance of outputs on the rows that were read."""
    merged, report = combine(adapters, Recipe("regmean", (0.5, 0.5)), on_base=on_base)
    mean, _ = combine(adapters, Recipe("linear", (0.5, 0.5)))
    assert report.learned == {"tokens_read": [30, 22]}
    for path in sorted(set(adapters[0].modules()) & set(adapters[1].modules())):
        full = {path: torch.eye(merged.factors(path)[0].shape[1], dtype=torch.float64)}
        grams = gather(on_base, full, progress=False)

        def distance(made: Adapter, path: str = path, grams: Any = grams) -> float:
            gaps = [update(made, path) - update(one, path) for one in adapters]
            return sum(float((g @ grams[s][path] * g).sum()) for g, s in zip(gaps, "xy", strict=True))

        assert distance(merged) < 0.999 * distance(mean)


def update(adapter: Adapter, path: str) -> torch.Tensor:
    a, b = adapter.factors(path)
    return b.double() @ a.double()


def stretched(one: Parent, read: Inputs) -> torch.Tensor:
    """The update in the norm of its outputs on these inputs: its Frobenius norm is their root mean square."""
    size, v = torch.linalg.eigh(read.gram_KK)
    return dense(one) @ v * size.clamp(min=0).sqrt()


@laws
@given(seed=seeds, rank=st.integers(1, 5), tokens=st.sampled_from([2, 40]))
def test_the_aware_cut_is_the_best_of_its_rank_on_the_inputs(seed: int, rank: int, tokens: int) -> None:
    """Eckart-Young in the norm of the outputs; never above the cut by weights; also where few tokens were read."""
    one = parent(seed, rank=6)
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed)).double() * torch.logspace(0, -2, 16)
    read = Inputs(torch.eye(16).double(), x.mT @ x / tokens)
    basis = reading_basis(one.a)
    cut = truncate_aware(one.a, one.b, basis.mT @ read.gram_KK @ basis, rank)
    whole = stretched(one, read)
    lost = float((whole - stretched(replace(one, a=cut.a, b=cut.b), read)).norm())
    plain = truncate(one.a, one.b, rank)
    by_weights = float((whole - stretched(replace(one, a=plain.a, b=plain.b), read)).norm())
    least = float(torch.linalg.svdvals(whole)[rank:].norm())
    size = float(whole.norm())
    assert lost <= by_weights + 1e-4 * size
    assert lost == pytest.approx(least, abs=2e-3 * size)  # what is added for directions that no row has
    assert 1 - cut.output_kept == pytest.approx((lost / size) ** 2, abs=1e-4)
    assert 1 - cut.output_kept_plain == pytest.approx((by_weights / size) ** 2, abs=1e-4)
    assert cut.error == pytest.approx(float((dense(one) - dense(replace(one, a=cut.a, b=cut.b))).norm()), rel=1e-3)
    assert len(cut.a) == rank


def test_equal_inputs_in_all_directions_make_the_aware_cut_the_plain_one() -> None:
    one = parent(5, rank=6)
    cut, plain = truncate_aware(one.a, one.b, 3.0 * torch.eye(6).double(), 2), truncate(one.a, one.b, 2)
    close(dense(replace(one, a=cut.a, b=cut.b)), dense(replace(one, a=plain.a, b=plain.b)))


@pytest.mark.parametrize("method", ["linear", "ties", "knots", "regmean"])
def test_an_aware_cut_of_a_whole_merge_keeps_more_of_its_outputs(
    on_base: OnBase, adapters: list[Adapter], method: str
) -> None:
    recipe = Recipe(method, (1.0, 1.0), {"rank": 2, "activation_aware": True})
    made, report = combine(adapters, recipe, on_base=on_base)
    whole, _ = combine(adapters, replace(recipe, options={"energy": 1.0}), on_base=on_base)
    assert set(made.card.ranks.values()) == {2}
    kept, plain = report.learned["output_kept"], report.learned["output_kept_by_weights_alone"]
    assert plain < kept < 1
    assert report.kept < 1 - 1e-3
    gaps = [float((update(whole, path) - update(made, path)).norm()) for path in whole.modules()]
    assert report.error == pytest.approx(sum(g**2 for g in gaps) ** 0.5 / total(whole), rel=1e-3)


def total(adapter: Adapter) -> float:
    return sum(float(update(adapter, path).norm()) ** 2 for path in adapter.modules()) ** 0.5


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("linear", {}, "give that"),
        ("linear", {"rank": 2, "energy": 0.9}, "no energy"),
        ("compress", {"rank": 2}, "cuts"),
    ],
)
def test_an_aware_cut_needs_a_rank_to_cut_to(method: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Recipe(method, (1.0,), {"activation_aware": True, **options})


def test_the_loss_of_a_weighting_is_that_of_the_merge_it_stands_for(on_base: OnBase, adapters: list[Adapter]) -> None:
    """Parents that speak together, beside their sum made by `linear` and put on the model."""
    model, weights = on_base.loaded.model, (0.8, -0.6)
    merged, _ = combine(adapters, Recipe("linear", weights))
    attach(model, merged, "sum")
    wanted = []
    for slot in "xy":
        scored = sequence_nll(model, on_base.examples[slot], "sum")
        wanted.append(sum(nll for nll, _ in scored) / sum(count for _, count in scored))
    got = mean_loss(model, batches_of(on_base, 4096), dict(zip("xy", weights, strict=True)))
    assert got == pytest.approx(sum(wanted) / 2, rel=1e-5)


@pytest.mark.parametrize("start", [(1.0, 1.0), (0.5, 0.5), (0.0, -1.0)])
def test_a_search_is_never_worse_than_its_start_and_what_it_says(
    on_base: OnBase, adapters: list[Adapter], start: tuple[float, float]
) -> None:
    recipe = Recipe("lorahub", start, {"evaluations": 12, "seed": 1})
    merged, report = combine(adapters, recipe, on_base=on_base)
    batches, found = batches_of(on_base, 4096), report.learned
    losses = [
        mean_loss(on_base.loaded.model, batches, dict(zip("xy", weights, strict=True)))
        for weights in (start, found["weights"])
    ]
    assert losses == pytest.approx([found["loss_before"], found["loss_after"]])
    assert losses[1] < losses[0]
    wanted, _ = combine(adapters, Recipe("linear", found["weights"]))
    assert merged.identity == wanted.identity
    again, _ = combine(adapters, recipe, on_base=on_base)
    other, _ = combine(adapters, replace(recipe, options={"evaluations": 12, "seed": 2}), on_base=on_base)
    assert again.identity == merged.identity != other.identity


def test_one_evaluation_is_the_start(on_base: OnBase, adapters: list[Adapter]) -> None:
    merged, report = combine(adapters, Recipe("lorahub", (0.3, 0.4), {"evaluations": 1}), on_base=on_base)
    wanted, _ = combine(adapters, Recipe("linear", (0.3, 0.4)))
    assert merged.identity == wanted.identity and report.learned["weights"] == [0.3, 0.4]


def test_a_search_finds_the_bottom_of_a_bowl() -> None:
    tries: list[tuple[float, ...]] = []

    def bowl(weights: Any) -> float:
        tries.append(tuple(weights))
        return (weights[0] - 0.9) ** 2 + 3 * (weights[1] + 0.4) ** 2

    best, before, after = searched(bowl, (0.5, 0.5), 60, seed=0, progress=False)
    assert len(tries) == 60 and tries[0] == (0.5, 0.5)
    assert before == bowl((0.5, 0.5)) and after == bowl(best) < 0.01 * before


def test_learned_weights_lower_the_loss_and_are_those_of_the_result(on_base: OnBase, adapters: list[Adapter]) -> None:
    """What it says of the loss is what the merged adapter has; the base and the parents on it are left as they were."""
    model, slots = on_base.loaded.model, on_base.slots
    before = {name: value.clone() for name, value in model.named_parameters()}
    recipe = Recipe("lora_soups", (0.5, 0.5), {"max_steps": 10, "learning_rate": 0.05})
    merged, report = combine(adapters, recipe, on_base=on_base)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(value.grad is None for value in model.parameters())
    found = report.learned
    assert found["loss_after"] < found["loss_before"]
    start = mean_loss(model, batches_of(on_base, 4096), dict.fromkeys(slots, 0.5))
    assert found["loss_before"] == pytest.approx(start, rel=1e-5)
    attach(model, merged, "sum")
    assert mean_loss(model, batches_of(on_base, 4096), {"sum": 1.0}) == pytest.approx(found["loss_after"], rel=1e-4)
    path = "model.layers.0.self_attn.q_proj"
    wanted = sum(w * update(one, path) for w, one in zip(found["weights"][path], adapters, strict=True))
    torch.testing.assert_close(update(merged, path), wanted, rtol=0, atol=1e-5)
    assert found["weights"]["model.layers.0.self_attn.v_proj"][0] is None  # the first adapter has nothing there


def test_the_gradient_of_a_weight_is_that_of_the_loss(on_base: OnBase) -> None:
    """Beside a difference of two losses."""
    model, place = on_base.loaded.model, ("model.layers.0.self_attn.q_proj", "x")
    batches, ones = batches_of(on_base, 4096), {"x": 1.0, "y": 1.0}
    with scaled(model, [place]) as parents:
        losses = []
        for alpha in (0.7 - 1e-2, 0.7 + 1e-2):
            parents.scale(torch.tensor([alpha]))
            losses.append(mean_loss(model, batches, ones))
        parents.scale(torch.tensor([0.7]))
        for slot in "xy":
            backward(model, batches[slot][0], dict.fromkeys("xy", 1.0))
        assert float(parents.gradient()) == pytest.approx((losses[1] - losses[0]) / 2e-2, rel=2e-2)


def test_scale_zero_leaves_nothing_to_learn(on_base: OnBase, adapters: list[Adapter]) -> None:
    with pytest.raises(ConfigError, match="at `scale` 0 nothing is left"):
        combine(adapters, Recipe("lora_soups", (0.5, 0.5), {"scale": 0.0}), on_base=on_base)


def test_weights_too_large_for_a_loss_are_told_as_such(on_base: OnBase, adapters: list[Adapter]) -> None:
    with pytest.raises(ModelError, match=r"not finite\. Next: smaller --weights or --scale"):
        combine(adapters, Recipe("lorahub", (3e38, 1.0), {"evaluations": 1}), on_base=on_base)


@pytest.mark.parametrize("rate", [1e3, 1e30])  # the second leads to no number
def test_a_step_that_wins_nothing_is_not_taken(on_base: OnBase, adapters: list[Adapter], rate: float) -> None:
    wild = Recipe("lora_soups", (0.5, 0.5), {"max_steps": 2, "learning_rate": rate})
    merged, report = combine(adapters, wild, on_base=on_base)
    wanted, _ = combine(adapters, Recipe("linear", (0.5, 0.5)))
    assert merged.identity == wanted.identity
    assert report.learned["loss_after"] == report.learned["loss_before"]
