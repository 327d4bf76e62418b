"""Functional interference: laws, and an oracle on dense updates and the inputs of each layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.measure.functional import Functional, functional, inner_products
from veneer.model.leaf import Leaf
from veneer.model.packed import hidden_states, running
from veneer.model.stream import pack

from tests.adapter.conftest import adapter_for, pico  # noqa: F401  # isort: skip

EXAMPLES = [SimpleNamespace(input_ids=[(7 * k + 3 * row) % 96 for k in range(5 + row)]) for row in range(6)]


def scaled(adapter: Adapter, factor: float) -> Adapter:
    tensors = {name: factor * t if name.endswith(".b") else t for name, t in adapter.tensors.items()}
    return Adapter(tensors, adapter.card)


def found_on(model: Any, *adapters: Adapter, max_tokens: int = 4096) -> Functional:
    """Of the second on the data of the first."""
    attach(model, adapters[0], "own")
    for number, other in enumerate(adapters[1:]):
        attach(model, other, f"other_{number}")
    return functional(model, adapters, 0, "own", EXAMPLES, max_tokens)[1]


def test_an_adapter_and_itself_its_opposite_and_its_double(pico: Any, adapter_for: Any) -> None:  # noqa: F811
    one = adapter_for(pico())
    for factor, ratio, cosine in ((1.0, 1.0, 1.0), (-1.0, 1.0, -1.0), (2.0, 4.0, 1.0)):
        found = found_on(pico(), one, scaled(one, factor))
        assert found.layers == 14
        assert found.ratio == pytest.approx(ratio, rel=1e-6)
        assert found.cosine == pytest.approx(cosine, rel=1e-6)
        assert found.ratios == pytest.approx(dict.fromkeys(one.modules(), ratio), rel=1e-6)


def test_a_zero_update_writes_nothing_and_measures_nothing(pico: Any, adapter_for: Any) -> None:  # noqa: F811
    one = adapter_for(pico())
    found = found_on(pico(), one, scaled(one, 0.0))
    assert (found.layers, found.ratio, found.cosine) == (14, 0.0, 0.0)
    assert found_on(pico(), scaled(one, 0.0), one) == Functional(0, None, None, {}, {})


def test_layers_of_one_alone_do_not_count(pico: Any, adapter_for: Any) -> None:  # noqa: F811
    shared, more = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    first, second = adapter_for(pico(), {shared: 2, more: 2}), adapter_for(pico(), {shared: 5}, seed=2)
    assert found_on(pico(), first, second).ratios.keys() == {shared}
    other = adapter_for(pico(), {more: 3}, seed=3)
    assert found_on(pico(), second, other).ratio is None


def test_against_dense(pico: Any, adapter_for: Any) -> None:  # noqa: F811
    first, second = adapter_for(pico(), 3), adapter_for(pico(), 5, seed=2)
    model = attach(attach(pico(), first, "own"), second, "other")
    fed: dict[str, list[Tensor]] = {}
    for leaf in [leaf for leaf in model.modules() if isinstance(leaf, Leaf)]:
        leaf.register_forward_pre_hook(lambda leaf, x: fed.setdefault(leaf.path, []).append(x[0].flatten(0, -2)))
    for example in EXAMPLES:
        with torch.no_grad(), running(model, pack([example.input_ids], ["own"])):
            hidden_states(model)
    found = found_on(pico(), first, second, max_tokens=16)  # several streams
    for path, inputs in fed.items():
        x_TI = torch.cat(inputs).double()
        y, z = (x_TI @ (b.double() @ a.double()).mT for a, b in (one.factors(path) for one in (first, second)))
        assert found.ratios[path] == pytest.approx(float(z.square().sum() / y.square().sum()), rel=1e-4)
        assert found.cosines[path] == pytest.approx(float((y * z).sum() / y.norm() / z.norm()), rel=1e-4, abs=1e-6)
    assert found.ratio == pytest.approx(sum(found.ratios.values()) / 14)


def test_the_inputs_are_those_of_who_speaks(pico: Any, adapter_for: Any) -> None:  # noqa: F811
    """The first layer's are the same whoever speaks; behind an adapted layer they are not."""
    one, other = adapter_for(pico(), 3), adapter_for(pico(), 3, seed=2)
    model = attach(attach(pico(), one, "one"), other, "other")
    by_one, by_other = (inner_products(model, [one, other], slot, EXAMPLES) for slot in ("one", "other"))
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    assert by_one[first] == pytest.approx(by_other[first], rel=1e-6)
    assert by_one[last][0, 0] != pytest.approx(by_other[last][0, 0], rel=1e-3)
    assert not any(leaf._forward_pre_hooks for leaf in model.modules() if isinstance(leaf, Leaf))
