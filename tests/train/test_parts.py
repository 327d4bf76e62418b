"""An adapter updated layer by layer, in backward: the same steps, with one layer's gradients at a time."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import pytest
import torch

from veneer.adapter.attach import detach, methods_of
from veneer.config import TrainSettings
from veneer.errors import ConfigError, NonFiniteLossError, TrainingError
from veneer.model.layers import arrange, decoder_layers
from veneer.train.fit import fit
from veneer.train.optim import by_family
from veneer.train.parts import PartedParameters, by_layer
from veneer.train.ranks import ALONE

bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
OPTIMS = ["adamw", pytest.param("adamw_8bit", marks=bitsandbytes)]
TARGETS = {"target_modules": ["q_proj", "k_proj", "down_proj"]}


@pytest.fixture
def trained(pico: Any, job: Any, examples: Any, run_loop: Any) -> Any:
    """trained(in_backward, **settings): a job after its steps, arranged as `train` does; the facts of its steps."""

    def train(in_backward: bool, watch: Any = None, told: bool = True, **settings: Any) -> tuple[Any, list]:
        settings = {"max_grad_norm": 0.0, "weight_decay": 0.1, "optimizer_in_bwd": in_backward, **settings}
        made = job(pico, "default", examples(16), lora=TARGETS, **settings)
        if told:  # of layers whose backward has ended
            fit(pico, made, made.settings, ALONE)
        return made, run_loop(pico, made, watch=watch)

    return train


def test_parts_are_the_layers_in_the_order_of_the_families(pico: Any, job: Any, examples: Any) -> None:
    job(pico, "default", examples(4), lora={"target_modules": "all-linear"})
    methods = methods_of(pico, "default")
    groups = by_layer(methods)
    assert [p for group in groups for p in group] == by_family(methods)
    assert [{id(p) for p in group} for group in groups] == [
        {id(p) for p in layer.parameters() if p.requires_grad} for layer in decoder_layers(pico)
    ]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("optim", OPTIMS)
def test_the_steps_are_the_same(pico: Any, trained: Any, optim: str, told: bool) -> None:
    found, facts = trained(True, told=told, optim=optim)
    values = found.flat.values_P.detach().clone()

    detach(pico, "default")
    wanted, expected = trained(False, optim=optim)
    # Moments in 8 bits share a scale by 256 numbers, which other parts cut elsewhere; otherwise it is rounding alone.
    close = 1e-5 if optim == "adamw" else 0.05
    assert (values - wanted.flat.values_P).norm() <= close * wanted.flat.values_P.norm()
    for (*_, one), (*_, other) in zip(facts, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=100 * close)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=100 * close)


def test_no_more_than_one_layers_gradients_are_held(pico: Any, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[set[str]] = []
    step_layer = PartedParameters.step_layer

    def counting(self: Any, layer: Any, *given: Any) -> Any:
        names = [name for name, p in pico.named_parameters() if p.grad is not None]
        held.append({name.partition(".self_attn")[0].partition(".mlp")[0] for name in names})
        return step_layer(self, layer, *given)

    monkeypatch.setattr(PartedParameters, "step_layer", counting)
    made, _ = trained(True, max_steps=2)
    assert held == [{"model.layers.1"}, {"model.layers.0"}] * 2
    assert all(p.grad is None for p in pico.parameters())
    assert not hasattr(made.flat, "grads_P")


@pytest.mark.parametrize("optim", OPTIMS)
def test_state_and_restore_are_inverse(pico: Any, trained: Any, job: Any, examples: Any, optim: str) -> None:
    one, _ = trained(True, optim=optim)
    settings = {"max_grad_norm": 0.0, "weight_decay": 0.1, "optimizer_in_bwd": True, "optim": optim}
    two = job(pico, "two", examples(16), lora=TARGETS, **settings)
    tensors, numbers = one.state()
    two.restore({name: value.clone() for name, value in tensors.items()}, numbers)
    again, numbers_again = two.state()
    assert numbers == numbers_again and again.keys() == tensors.keys() > {"values"}
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    for each in (one, two):
        for part in each.flat.parts:
            part.parameters[0].grad = torch.ones_like(part.parameters[0])  # the others count as zero
        each.update(torch.tensor(1.0))
    assert torch.equal(one.flat.values_P, two.flat.values_P)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("broken, updated", [(1, []), (0, [1])])  # the last layer's backward comes first
def test_a_gradient_that_is_not_finite_stops_every_later_update(
    pico: Any, job: Any, examples: Any, run_loop: Any, broken: int, updated: list[int], ahead: bool
) -> None:
    made = job(pico, "default", examples(16), lora=TARGETS, max_grad_norm=0.0, optimizer_in_bwd=True)
    fit(pico, made, made.settings, ALONE)
    before: list[torch.Tensor] = []
    begin = made.begin

    def noting() -> None:
        if made.step == 2:
            before[:] = [part.values.detach().clone() for part in made.flat.parts]
        begin()

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if made.step == 2 else gradient

    made.begin = noting

    [group] = [part.parameters for n, part in enumerate(made.flat.parts) if n == broken]
    group[0].register_hook(spoil)
    with pytest.raises(NonFiniteLossError, match=r"step 3 of 6 .* was perhaps updated in part"):
        run_loop(pico, made, ahead=ahead)
    changed = [n for n, part in enumerate(made.flat.parts) if not torch.equal(part.values, before[n])]
    assert changed == updated


def test_a_job_that_is_done_stays_as_it_is_while_others_go_on(
    pico: Any, job: Any, examples: Any, run_loop: Any
) -> None:
    settings = {"max_grad_norm": 0.0, "optimizer_in_bwd": True, "weight_decay": 0.1}
    one, two = (job(pico, name, examples(16), max_steps=n, **settings) for name, n in (("one", 3), ("two", 6)))
    arrange(pico, recompute=-1, ended=lambda layer: [made.layer_ended(layer) for made in (one, two)])
    seen: list[torch.Tensor] = []

    def watch(made: Any, facts: dict) -> None:
        if made is one and facts["step"] == 3:
            seen.append(one.flat.values_P.detach().clone())

    run_loop(pico, one, two, watch=watch)
    assert two.step == 6 and torch.equal(one.flat.values_P, seen[0])


def test_a_layer_that_runs_twice_is_an_error(pico: Any, job: Any, examples: Any, run_loop: Any) -> None:
    pico.model.layers[1] = pico.model.layers[0]
    made = job(pico, "default", examples(16), lora=TARGETS, max_grad_norm=0.0, optimizer_in_bwd=True)
    fit(pico, made, made.settings, ALONE)
    with pytest.raises(TrainingError, match="ended twice in a step"):
        run_loop(pico, made)


def test_a_step_that_was_given_up_leaves_nothing(pico: Any, job: Any, examples: Any, run_loop: Any) -> None:
    made = job(pico, "default", examples(16), lora=TARGETS, max_grad_norm=0.0, optimizer_in_bwd=True)
    fit(pico, made, made.settings, ALONE)
    made.flat.parts[1].norm = torch.tensor(1.0)
    made.flat.parts[0].parameters[0].grad = torch.full_like(made.flat.parts[0].parameters[0], math.nan)
    assert len(run_loop(pico, made)) == 6


def test_all_layers_are_recomputed_and_it_is_said(pico: Any, job: Any, examples: Any) -> None:
    made = job(pico, "default", examples(16), max_grad_norm=0.0, optimizer_in_bwd=True)
    graphs, notes = fit(pico, made, made.settings, ALONE)
    assert not graphs and "--optimizer-in-bwd" in notes[0]
    assert copy.deepcopy(pico).model.layers[0].forward.how.ended is decoder_layers(pico)[0].forward.how.ended


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "max_grad_norm"),
        ({"max_grad_norm": 0, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"max_grad_norm": 0, "gradient_checkpointing": False}, "gradient_checkpointing"),
        ({"max_grad_norm": 0, "fsdp": True}, "fsdp"),
    ],
)
def test_what_needs_all_gradients_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainSettings(optimizer_in_bwd=True, **settings)
