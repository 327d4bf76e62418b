"""The leaf that stands for a linear layer: slots, the general path, and the state under the original names.

Legend: T tokens, I in, O out.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.bases.dense import Dense
from veneer.methods.base import Method
from veneer.methods.lora import LoRA
from veneer.model.leaf import Leaf
from veneer.model.packed import Wiring
from veneer.model.stream import Span, Stream


class Opaque(Method):
    """LoRA that the fused kernel does not know: it must take the general path."""

    def __init__(self, inner: LoRA) -> None:
        super().__init__()
        self.inner = inner

    def delta(self, x_TI, y_TO, base, gate_TR=None):
        assert y_TO.shape == (len(x_TI), base.out_features)
        torch.testing.assert_close(y_TO, x_TI @ base.weight.t())  # the base's output, without bias
        return self.inner.delta(x_TI, y_TO, base, gate_TR)


def make(bias: bool = True, opaque: bool = False, dtype=torch.float64) -> Leaf:
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    leaf = Leaf(Dense(nn.Parameter(random(5, 6)), nn.Parameter(random(5)) if bias else None), Wiring(), "layer")
    for name, rank in (("one", 2), ("two", 3)):
        method = LoRA(random(rank, 6), random(5, rank), 0.5 + rank)
        leaf.slots[name] = Opaque(method) if opaque else method
        leaf.wiring.slots.append(name)
    return leaf


def stream(tokens: int, spans) -> Stream:
    return Stream(torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens), (tokens,), tuple(spans))


def wanted(leaf: Leaf, x: torch.Tensor, spans) -> torch.Tensor:
    """y + bias + Σ over spans of weight · Δ, row by row with dense weights."""
    rows = []
    for t, row in enumerate(x):
        weight = leaf.weight
        for span in spans:
            if span.start <= t < span.stop and span.slot in leaf.slots:
                method = leaf.slots[span.slot]
                method = method.inner if isinstance(method, Opaque) else method
                weight = weight + span.weight * method.scale * method.b_OR @ method.a_RI
        rows.append(weight @ row + (leaf.bias if leaf.bias is not None else 0))
    return torch.stack(rows)


@st.composite
def spans(draw, tokens: int = 9):
    made = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, tokens))
        slot = draw(st.sampled_from(["one", "two", "elsewhere"]))
        made.append(Span(start, draw(st.integers(start, tokens)), slot, draw(st.sampled_from([1.0, 0.5, -2.0, 0.0]))))
    return made


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@given(spans=spans())
def test_output_and_gradients_with_any_spans(bias, opaque, spans):
    """Overlapping spans, spans of a slot that has no method here, empty spans, rows in no span."""
    leaf = make(bias, opaque)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    g = torch.randn(9, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    learned = [p for p in leaf.parameters() if p.requires_grad]
    leaf.wiring.stream = stream(9, spans)
    got, oracle = leaf(x[None])[0], wanted(leaf, x, spans)
    torch.testing.assert_close(got, oracle)
    mine = torch.autograd.grad((got * g).sum(), [x, *learned], allow_unused=True)
    theirs = torch.autograd.grad((oracle * g).sum(), [x, *learned], allow_unused=True)
    for tensor, a, b in zip([x, *learned], mine, theirs, strict=True):  # no gradient is a gradient of zero
        zero = torch.zeros_like(tensor)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


def test_shapes_of_ordinary_calls():
    leaf = make()
    leaf.wiring.voice = "one"
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert leaf(x).shape == (2, 3, 4, 5)
    torch.testing.assert_close(leaf(x)[1, 2, 3], leaf(x[1, 2, 3]))
    torch.testing.assert_close(leaf(x.transpose(0, 2)), leaf(x).transpose(0, 2))
    leaf.wiring.voice = None
    torch.testing.assert_close(leaf(x), nn.functional.linear(x, leaf.weight, leaf.bias))


def test_a_voice_without_a_method_here_is_the_base():
    leaf = make()
    leaf.wiring.voice = "elsewhere"
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(leaf(x), nn.functional.linear(x, leaf.weight, leaf.bias))


def test_rows_that_are_not_the_streams_are_an_error():
    leaf = make()
    leaf.wiring.stream = stream(9, [Span(0, 9, "one")])
    with pytest.raises(RuntimeError, match="layer: got 4 rows, the running stream has 9"):
        leaf(torch.zeros(1, 4, 6, dtype=torch.float64))


def test_it_answers_as_a_linear_layer():
    leaf = make()
    assert (leaf.in_features, leaf.out_features) == (6, 5)
    assert leaf.weight is leaf.base.weight and leaf.bias is leaf.base.bias
    assert not leaf.weight.requires_grad and not leaf.bias.requires_grad
    assert "one" in repr(leaf) and "in_features=6" in repr(leaf)


# State.


@pytest.mark.parametrize("bias", [False, True])
def test_the_state_is_the_linear_layers(bias):
    leaf = make(bias)
    model = nn.Sequential(leaf)
    assert list(model.state_dict()) == (["0.weight", "0.bias"] if bias else ["0.weight"])
    assert list(leaf.state_dict()) == (["weight", "bias"] if bias else ["weight"])
    assert torch.equal(model.state_dict()["0.weight"], leaf.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_a_linear_layers_state_loads_and_slots_stay(assign):
    model, linear = nn.Sequential(make()), nn.Sequential(nn.Linear(6, 5).double())
    slots = copy.deepcopy(model[0].slots.state_dict())
    result = model.load_state_dict(linear.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(model[0].weight, linear[0].weight) and torch.equal(model[0].bias, linear[0].bias)
    assert all(torch.equal(value, slots[name]) for name, value in model[0].slots.state_dict().items())
    linear.load_state_dict(model.state_dict())


def test_loading_still_tells_what_is_missing_or_not_understood():
    model = nn.Sequential(make())
    state = nn.Sequential(nn.Linear(6, 5).double()).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing.*bias"):
        model.load_state_dict({"0.weight": state["0.weight"]})
    with pytest.raises(RuntimeError, match=r"Unexpected.*other"):
        model.load_state_dict({**state, "0.other": state["0.bias"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "0.weight": torch.zeros(5, 7)})


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_separate(again):
    model = nn.Sequential(make(), make())
    model[1].wiring = model[0].wiring
    model[0].wiring.voice = "one"
    x = torch.randn(3, 6, dtype=torch.float64)
    copied = again(model)
    assert copied[0].wiring is copied[1].wiring is not model[0].wiring
    torch.testing.assert_close(copied[0](x), model[0](x))
    copied[0].slots["one"].b_OR.data.zero_()
    copied[0].wiring.voice = "two"
    assert model[0].wiring.voice == "one" and model[0].slots["one"].b_OR.any()
    copied.load_state_dict(model.state_dict())  # the hook came along, and belongs to the copy
