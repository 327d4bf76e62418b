"""Leaves that read the same tensor are computed together, and only those."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch

from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings
from veneer.kernels import lora
from veneer.model import siblings
from veneer.model.load import prepare
from veneer.model.packed import hidden_states, running, speaking, wiring_of
from veneer.model.stream import Span, Stream, pack
from veneer.model.swap import leaf_at

SEQUENCES = [[5, 6, 7, 8, 9], [10, 11, 12]]


def filled(model, slot: str, settings: LoraSettings):
    attach(model, settings, slot)
    generator = torch.Generator().manual_seed(len(slot))
    for method in methods_of(model, slot).values():
        method.b_OR.data = torch.randn(method.b_OR.shape, generator=generator) * 0.1
    return model


def both_slots(model):
    filled(model, "one", LoraSettings(r=3))
    return filled(model, "three", LoraSettings(r=2, target_modules=["q_proj", "up_proj"]))


@pytest.fixture
def model(pico):
    for parameter in pico.parameters():
        parameter.data *= 15 if parameter.dim() > 1 else 1  # fresh weights make uniform attention, gradients of nothing
    prepare(pico)
    return both_slots(pico)


def stream() -> Stream:
    """ "one" speaks over all, "three" over the second sequence too."""
    plain = pack(SEQUENCES, ["one", "one"])
    return Stream(plain.token_ids_T, plain.positions_T, plain.lengths, (*plain.spans, Span(5, 8, "three", 0.5)))


def found(model):
    model.zero_grad()
    with running(model, stream()):
        hidden = hidden_states(model)
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    methods = [method for slot in ("one", "three") for method in methods_of(model, slot).values()]
    return [hidden.detach(), *(p.grad for method in methods for p in (method.a_RI, method.b_OR))]


def calls(action) -> list[int]:
    """How many layers each call of the operation computed."""
    made = []
    real = lora._LoraLinears.apply

    def watched(x_TI, bases, *rest):
        made.append(len(bases))
        return real(x_TI, bases, *rest)

    with mock.patch.object(lora._LoraLinears, "apply", watched):
        action()
    return made


def test_four_calls_a_layer_and_the_results_of_seven(model):
    together = found(model)
    assert calls(lambda: found(model)) == [3, 1, 2, 1] * 2
    with mock.patch.object(siblings, "SIBLINGS", ()):
        apart_model = both_slots(copy_without_slots(model))
        copy_factors(model, apart_model)
        apart = found(apart_model)
        assert calls(lambda: found(apart_model)) == [1] * 14
    for mine, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def copy_without_slots(model):
    from veneer.adapter.attach import detach

    other = copy.deepcopy(model)
    detach(other)
    return other


def copy_factors(source, target) -> None:
    for slot in ("one", "three"):
        for path, method in methods_of(source, slot).items():
            other = methods_of(target, slot)[path]
            other.a_RI.data, other.b_OR.data = method.a_RI.data.clone(), method.b_OR.data.clone()


def test_a_copied_model_speaks_with_its_own_leaves(model):
    other = copy.deepcopy(model)
    for method in methods_of(other, "one").values():
        method.b_OR.data.zero_()
    before = found(model)[0]
    assert not torch.equal(found(other)[0], before)
    assert torch.equal(found(model)[0], before)


@pytest.fixture
def pair(model):
    """Two leaves that are siblings, inside a running stream of 8 tokens."""
    with running(model, stream()):
        yield [leaf_at(model, f"model.layers.0.self_attn.{name}") for name in ("q_proj", "k_proj")]


def test_only_the_very_same_tensor_is_taken_for_it(pair):
    """Not one of equal version and shape, and not the same one changed in place since."""
    first, second = pair
    x, other = torch.randn(8, 32), torch.randn(8, 32)
    with torch.no_grad():
        alone, doubled = second(other.clone()), second(x * 2)
        first(x)
        assert torch.equal(second(other), alone)
        first(x)
        x.mul_(2.0)
        assert torch.equal(second(x), doubled)


def test_outputs_made_without_gradient_serve_no_call_with_one(pair):
    first, second = pair
    x = torch.randn(8, 32, requires_grad=True)
    with torch.no_grad():
        first(x)
    assert second(x).requires_grad


def test_layers_of_other_input_sizes_are_no_siblings(pair, monkeypatch):
    first, second = pair
    wanted = first(torch.ones(8, 32))
    monkeypatch.setattr(second.base, "in_features", 16)
    assert torch.equal(first(torch.ones(8, 32)), wanted)


def test_ordinary_calls_compute_each_leaf_alone(model):
    """What runs outside a stream may call leaves in threads, by halves, or with other tensors for each."""
    with speaking(model, "one"):
        assert calls(lambda: model(torch.tensor([SEQUENCES[0]]))) == [1] * 14
        with torch.no_grad():
            wanted = model(torch.tensor([SEQUENCES[0]])).logits
        with torch.inference_mode():
            assert torch.equal(model(torch.tensor([SEQUENCES[0]])).logits, wanted)


def test_nothing_waits_after_a_pass_even_one_that_failed(model):
    waiting = wiring_of(model).waiting
    found(model)
    assert waiting._fed is None and not waiting._outputs

    def stop(module, given):
        assert waiting._outputs
        raise KeyboardInterrupt

    leaf_at(model, "model.layers.1.self_attn.k_proj").register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), running(model, stream()):
        hidden_states(model)
    assert waiting._fed is None and not waiting._outputs
    copy.deepcopy(model)
