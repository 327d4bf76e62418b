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
from veneer.model.packed import hidden_states, running, speaking
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


def test_other_tensors_are_served_one_by_one(model):
    """Equal values do not make the same tensor; nor does the same tensor, changed in place since."""
    first, second = (leaf_at(model, f"model.layers.0.self_attn.{name}") for name in ("q_proj", "k_proj"))
    x = torch.randn(4, 32)
    with speaking(model, "one"), torch.no_grad():
        alone = second(x.clone())
        first(x)
        assert torch.equal(second(x.clone()), alone)
        first(x)
        x.mul_(2.0)
        changed = second(x)
        torch.testing.assert_close(changed, second(x.clone()))
        assert not torch.allclose(changed, alone)


def test_inference_mode_works(model):
    ids = torch.tensor([SEQUENCES[0]])
    with speaking(model, "one"):
        with torch.no_grad():
            wanted = model(ids).logits
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, wanted)


def test_nothing_waits_after_a_pass(model):
    found(model)
    groups = {id(leaf.siblings): leaf.siblings for leaf in model.modules() if hasattr(leaf, "siblings")}
    assert len(groups) == 8
    assert all(not group._waiting and group._x is None for group in groups.values())
