"""Several adapters and a recipe -> one adapter: what is refused, what is said, what the card and the report hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from veneer.adapter.card import Adapter, Card
from veneer.errors import AdapterError, ConfigError, NotMergeable, WrongBaseError
from veneer.merge.apply import combine
from veneer.merge.recipe import Recipe
from veneer.model.fingerprint import UNKNOWN, Fingerprint

SHAPES = {"q_proj": (16, 16), "up_proj": (24, 16)}
BASE = Fingerprint(*(digit * 64 for digit in "1234"))
SUM = Recipe("linear", (1.0, 1.0))


def adapter(
    seed: int, rank: int = 2, layers: int = 2, names=tuple(SHAPES), method: str = "lora", blocks="model.layers", **card
) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    tensors, ranks = {}, {}
    for path in (f"{blocks}.{layer}.{name}" for layer in range(layers) for name in names):
        outputs, inputs = SHAPES[path.rpartition(".")[2]]
        tensors[f"{path}.a"] = torch.randn(rank, inputs, generator=draw)
        tensors[f"{path}.b"] = torch.randn(outputs, rank, generator=draw)
        if method == "dora":
            tensors[f"{path}.m"] = torch.rand(outputs, generator=draw)
        ranks[path] = rank
    about = {"settings": {}, "scales": dict.fromkeys(ranks, 2.0), "ranks": ranks, "base": BASE, **card}
    return Adapter(tensors, Card(method, **about))


def update(found: Adapter, module: str) -> torch.Tensor:
    a_RI, b_OR = found.factors(module)
    return b_OR.double() @ a_RI.double()


def test_negation_takes_a_skill_away_again():
    a, b = adapter(0), adapter(1)
    both, _ = combine([a, b], SUM)
    rest, _ = combine([both, b], Recipe("linear", (1, -1)))
    for module in a.modules():
        torch.testing.assert_close(update(rest, module), update(a, module), rtol=0, atol=1e-5)
    assert rest.card.ranks == a.card.ranks  # what cancelled is gone from the factors too


def test_analogy_is_a_minus_b_plus_c():
    a, b, c = (adapter(seed, rank=seed + 1) for seed in range(3))
    got, report = combine([a, b, c], Recipe("linear", (1, -1, 1)))
    for module in a.modules():
        wanted = update(a, module) - update(b, module) + update(c, module)
        torch.testing.assert_close(update(got, module), wanted, rtol=0, atol=1e-5)
    assert report.kept == pytest.approx(1) and report.error < 1e-6


def test_the_card_says_where_it_comes_from():
    a, b = (adapter(seed, base_name="org/base", storage="dense bfloat16", template_text="T") for seed in (0, 1))
    got, report = combine([a, b], Recipe("svd", (0.5, 0.5), {"rank": 2}))
    assert got.card.parents == (a.identity, b.identity)
    assert (got.card.base, got.card.base_name, got.card.storage) == (BASE, "org/base", "dense bfloat16")
    assert got.card.template_text == "T" and set(got.card.scales.values()) == {1.0}
    assert got.card.training["merge"]["options"]["rank"] == 2
    assert report.notes == ()
    assert json.loads(json.dumps(report.to_json()))["recipe"]["method"] == "svd"


def test_what_parents_do_not_agree_on_is_left_out():
    a = adapter(0, base_name="one", template_text="T", training={"options": {"system_prompt": "Be brief."}})
    b = adapter(1, base_name="two", training={"options": {"system_prompt": "Be brief."}})
    got, _ = combine([a, b], SUM)
    assert (got.card.base_name, got.card.template_text, got.card.system_prompt) == (None, None, "Be brief.")
    got, _ = combine([a, adapter(1)], SUM)
    assert got.card.system_prompt is None


def test_the_report_tells_what_the_rank_left():
    a, b = adapter(0), adapter(1)
    got, report = combine([a, b], Recipe("linear", (1, 1), {"rank": 2}))
    lost, whole = 0.0, 0.0
    for module in a.modules():
        total = update(a, module) + update(b, module)
        error = float((total - update(got, module)).norm())
        assert report.layers[module].error == pytest.approx(error, rel=1e-5)
        assert report.layers[module].kept == pytest.approx(1 - (error / float(total.norm())) ** 2, rel=1e-5)
        lost, whole = lost + error**2, whole + float(total.norm()) ** 2
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert report.kept == pytest.approx(1 - lost / whole, rel=1e-5)
    assert report.worst_kept == min(layer.kept for layer in report.layers.values())


def test_layers_that_one_lacks_are_zero_there_and_said():
    a, b = adapter(0), adapter(1, names=("q_proj",))
    got, report = combine([a, b], SUM)
    assert got.modules() == a.modules()
    alone = update(a, "model.layers.0.up_proj")
    torch.testing.assert_close(update(got, "model.layers.0.up_proj"), alone, rtol=0, atol=1e-5)
    (note,) = report.notes
    assert note.startswith("adapter 2 has nothing for 2 of 4 layers, merged without it: model.layers.0.up_proj")


def test_another_base_is_refused_with_all_that_differs():
    other = replace(BASE, weights="9" * 64, tokenizer="8" * 64)
    with pytest.raises(WrongBaseError) as error:
        combine([adapter(0), adapter(1, base=other), adapter(2)], Recipe("linear", (1, 1, 1)))
    text = str(error.value)
    assert "weights of the base: adapter 2 was trained on another than adapter 1" in text
    assert "tokenizer of the base: adapter 2 " in text and "adapter 3 was trained on another than adapter 2" in text


def test_another_template_is_said_and_unknown_parts_are_not_claimed():
    _, report = combine([adapter(0), adapter(1, base=replace(BASE, template="9" * 64))], SUM)
    assert report.notes == ("template of the base: adapter 2 was trained on another than adapter 1",)
    got, report = combine([adapter(0), adapter(1, base=None)], SUM)
    assert got.card.base is None and report.notes == ("base unverified, not recorded: adapter 2",)
    got, _ = combine([adapter(0), adapter(1, base=replace(BASE, weights=UNKNOWN))], SUM)
    assert got.card.base == replace(BASE, weights=UNKNOWN)


def test_bases_of_other_names_are_told_and_refused_where_layers_are_called_otherwise():
    a, b = adapter(0, base=None, base_name="org/one"), adapter(1, base_name="two")
    got, report = combine([a, b], SUM)
    assert got.card.base_name is None
    assert report.notes[0].startswith("adapter 2 names two as its base, adapter 1 org/one: whether they are one is not")
    other = adapter(1, base_name="two", blocks="transformer.h")
    with pytest.raises(
        WrongBaseError, match=r"adapter 2 names two .* called otherwise: transformer.h… and model.layers…"
    ):
        combine([a, other], SUM)
    attention, mlp = (adapter(0, names=(only,), base=None, base_name=only) for only in SHAPES)
    assert "names up_proj as its base" in combine([attention, mlp], SUM)[1].notes[0]  # two halves of one model, perhaps
    for names in (("one", "one"), ("one", None)):
        a, b = (adapter(0, base=None, base_name=name, names=(only,)) for name, only in zip(names, SHAPES, strict=True))
        assert not any("names" in note for note in combine([a, b], SUM)[1].notes)
    a, b = adapter(0, base_name="path/one"), adapter(1, base_name="org/one")  # known to be one by its weights
    assert combine([a, b], SUM)[1].notes == ()


def test_an_adapter_given_twice_is_told():
    _, report = combine([adapter(0), adapter(1), adapter(0)], Recipe("linear", (1, 1, 1)), names=["a", "b", "c"])
    assert report.notes == ("c is the same adapter as a",)


def test_layers_of_other_shapes_are_refused(monkeypatch):
    monkeypatch.setitem(SHAPES, "up_proj", (24, 16))
    a = adapter(0)
    monkeypatch.setitem(SHAPES, "up_proj", (20, 16))
    wanted = r"model.layers.0.up_proj \(adapter 1 \[24, 16\], adapter 2 \[20, 16\]\)"
    with pytest.raises(WrongBaseError, match=wanted):
        combine([a, adapter(1)], SUM)


def test_dora_is_refused_by_name():
    with pytest.raises(NotMergeable) as error:
        combine([adapter(0, method="dora"), adapter(1), adapter(2, method="dora")], Recipe("linear", (1, 1, 1)))
    text = str(error.value)
    assert "adapter 1 is dora" in text and "adapter 3 is dora" in text and "adapter 2" not in text
    assert "magnitude" in text and "--into-base" in text


def test_each_kind_that_is_refused_has_advice_of_its_own():
    plain, rows, biased = adapter(0), adapter(1), adapter(2)
    ids = {"trainable_token_indices": {"model.embed_tokens": [5]}}
    rows = Adapter({**rows.tensors, "model.embed_tokens.rows": torch.ones(1, 16)}, replace(rows.card, settings=ids))
    biases = {f"{module}.c": torch.ones(len(biased.factors(module)[1])) for module in biased.modules()}
    biased = Adapter(biased.tensors | biases, replace(biased.card, method="biased"))
    with pytest.raises(NotMergeable) as error:
        combine([plain, rows, biased], Recipe("linear", (1, 1, 1)))
    text = str(error.value)
    assert "adapter 2 is lora: beside B·A it learned rows of tokens" in text and "DoRA" not in text
    assert "rows of tokens into the base by themselves" in text and "Keep an adapter with biases as it is" in text


@pytest.mark.parametrize("method", ["linear", "cat", "ties"])
def test_weights_that_overflow_are_told_from_damaged_factors(method: str):
    with pytest.raises(AdapterError, match="the result overflows; give smaller --weights"):
        combine([adapter(0), adapter(1)], Recipe(method, (3e38 * 10, 1)))


def test_another_number_of_weights_is_refused():
    with pytest.raises(ConfigError, match="got 2 for 3 adapters"):
        combine([adapter(i) for i in range(3)], SUM)


def test_values_that_are_no_numbers_any_more_are_refused_with_their_layers():
    broken = adapter(0)
    for name in ("model.layers.0.q_proj.a", "model.layers.1.up_proj.b"):
        broken.tensors[name].fill_(torch.nan)
    with pytest.raises(AdapterError) as error:
        combine([broken, adapter(1)], SUM)
    assert "model.layers.0.q_proj: " in str(error.value) and "model.layers.1.up_proj: " in str(error.value)
    with pytest.raises(AdapterError, match=r"infinite|overflow"):
        combine([adapter(0), adapter(1)], Recipe("linear", (1e300, 1.0)))


def test_what_cancels_everywhere_is_said():
    got, report = combine([adapter(0), adapter(0)], Recipe("linear", (1, -1)))
    assert set(got.card.ranks.values()) == {1} and all(bool((t == 0).all()) for t in got.tensors.values())
    assert "zero everywhere" in report.notes[-1]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit_and_stays(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got, _ = combine([adapter(0, 8), adapter(1, 8)], Recipe("ties", (1, 0.5), {"rank": 4}))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    alone, _ = combine([adapter(0, 8), adapter(1, 8)], Recipe("ties", (1, 0.5), {"rank": 4}))
    assert got.identity == alone.identity


def test_recipe_survives_json():
    recipe = Recipe("dare_ties", (1, -0.5), {"density": 0.3, "seed": 7})
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert (again.method, again.weights, again.settings) == (recipe.method, recipe.weights, recipe.settings)
    with pytest.raises(ConfigError, match="unknown weight; missing weights"):
        Recipe.from_json({"method": "linear", "weight": [1]})
    with pytest.raises(ConfigError, match="list of numbers"):
        Recipe.from_json({"method": "linear", "weights": "1,2"})
