"""Adapters on experts: what a model computes with them, packed and alone, against dense weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families import config_of, model_of
from veneer.adapter.attach import attach, detach, merge_into, methods_of
from veneer.config import LoraSettings
from veneer.errors import ConfigError, ModelError
from veneer.methods.experts import ExpertLoRA
from veneer.model.experts import expert_parameters, expert_paths
from veneer.model.head import head_of
from veneer.model.layers import arrange, as_they_were
from veneer.model.losses import cross_entropy, targets_of
from veneer.model.packed import hidden_states, running, speaking
from veneer.model.stream import Span, Stream, pack
from veneer.model.swap import base_at

FEW = {"num_experts_per_tok": 2, "head_dim": 8}
NO_YARN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
FAMILIES = {
    "qwen3_moe": partial(config_of, "qwen3_moe", num_experts=4, moe_intermediate_size=16, **FEW),
    "mixtral": partial(config_of, "mixtral", num_local_experts=4, **FEW),
    # Weights (E, I, O), biases, gate and up interleaved
    "gpt_oss": partial(config_of, "gpt_oss", num_local_experts=4, sliding_window=8, **FEW, **NO_YARN),
}
TARGETS = ["q_proj", "gate_up_proj", "down_proj"]
SEQUENCES = [[3, 9, 27, 20, 60, 58, 52], [5, 5, 6], [11, 12, 40, 41], [7]]
WHO = ["one", "two", None, "one"]


def made(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = model_of(FAMILIES[family]()).to(dtype)
    model.set_experts_implementation("eager")  # the family's own loop; torch's grouped product knows no float64
    return model


def spoken(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With two slots that are far from zero, of other ranks and targets."""
    model = attach(made(family, dtype), LoraSettings(r=3, lora_alpha=2, target_modules=TARGETS), "one")
    attach(model, LoraSettings(r=2, lora_alpha=5, target_modules=["o_proj", "experts.down_proj"]), "two")
    generator = torch.Generator().manual_seed(1)
    for slot in ("one", "two"):
        for method in methods_of(model, slot).values():
            method.b_OR.data = 0.2 * torch.randn(method.b_OR.shape, generator=generator)
            method.to(dtype)
    return model


def alone(model: nn.Module, sequence: list[int], slot: str | None) -> torch.Tensor:
    with speaking(model, slot):
        return model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]


def packed(model: nn.Module, stream: Stream) -> list[torch.Tensor]:
    with running(model, stream):
        logits_TV = head_of(model)(hidden_states(model))
    return list(logits_TV.split(stream.lengths))


def densely(model: nn.Module, slot: str) -> Callable[[torch.Tensor], Any]:
    """The family's own code, on weights W + s B A that are summed in the graph of the slot's factors."""
    plain = detach(copy.deepcopy(model))
    weights = {}
    for path, method in methods_of(model, slot).items():
        base, delta = base_at(model, path), method.b_OR @ method.a_RI * method.scale
        transposed = isinstance(method, ExpertLoRA) and base.transposed
        name = path if isinstance(method, ExpertLoRA) else f"{path}.weight"
        weights[name] = base.weight.detach() + (delta.mT if transposed else delta)
    return lambda ids: torch.func.functional_call(plain, weights, (), {"input_ids": ids, "use_cache": False})


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone_whoever_speaks(family):
    model = spoken(family)
    base = [alone(made(family), sequence, None) for sequence in SEQUENCES]
    for sequence, who, found, without in zip(SEQUENCES, WHO, packed(model, pack(SEQUENCES, WHO)), base, strict=True):
        torch.testing.assert_close(found, alone(model, sequence, who))
        assert torch.allclose(found, without) == (who is None)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_dense_weights(family):
    """In float64, so that what differs is not rounding."""
    model, stream = spoken(family), pack(SEQUENCES, WHO)
    factors = [[p for m in methods_of(model, slot).values() for p in m.parameters()] for slot in ("one", "two")]

    def loss(logits_TV: torch.Tensor, sequence: list[int]) -> torch.Tensor:
        return nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(sequence[1:]), reduction="sum")

    with running(model, stream):
        logits = head_of(model)(hidden_states(model)).split(stream.lengths)
        losses = [loss(*both) for both in zip(logits[:3], SEQUENCES[:3], strict=True)]
        found = torch.autograd.grad(sum(losses), factors[0] + factors[1])
    wanted: list[torch.Tensor] = []
    for number, slot in enumerate(("one", "two")):
        dense = loss(densely(model, slot)(torch.tensor([SEQUENCES[number]])).logits[0], SEQUENCES[number])
        wanted += torch.autograd.grad(dense, factors[number])
        torch.testing.assert_close(losses[number], dense)
    assert len(found) == 2 * (3 + 2) * 2
    for got, want in zip(found, wanted, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_weigh_and_overlap(family):
    """Both slots over the middle rows: each adds its own, by its weight. Rows outside are the base's."""
    model, ids = spoken(family), torch.tensor(SEQUENCES[0])
    spans = (Span(1, 5, "one", 0.5), Span(3, 6, "two", -2.0))
    leaf = next(m for m in model.modules() if getattr(m, "path", "").endswith("experts.down_proj"))
    seen = {}
    added = type(leaf).added

    def watched(self, x_SI, y_SO, routes, spans):
        y_after = added(self, x_SI, y_SO, routes, spans)
        if self is leaf:
            seen.update(x=x_SI, before=y_SO, after=y_after, routes=routes)
        return y_after

    type(leaf).added = watched
    try:
        packed(model, Stream(ids, torch.arange(len(ids)), (len(ids),), spans))
    finally:
        type(leaf).added = added
    token_S, expert_S = seen["routes"].order_S // 2, seen["routes"].expert_S
    wanted = seen["before"].clone()
    for row, (token, expert) in enumerate(zip(token_S.tolist(), expert_S.tolist(), strict=True)):
        for span in spans:
            method = leaf.slots[span.slot]
            if span.start <= token < span.stop:
                delta_OI = method.b_OR[expert] @ method.a_RI[expert] * method.scale
                wanted[row] += span.weight * (delta_OI @ seen["x"][row])
    assert not torch.allclose(seen["before"], wanted)
    torch.testing.assert_close(seen["after"], wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_calls_generate_and_merging_agree(family):
    model = spoken(family, torch.float32)
    ids = torch.tensor([SEQUENCES[0], SEQUENCES[0][::-1]])
    more = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 60}
    with speaking(model, None):
        untold = model.generate(ids, **more)
    said, logits = model.generate(ids, **more), model(input_ids=ids).logits
    merge_into(model, "one")
    assert not torch.equal(untold, said)
    with speaking(model, None):
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(ids, **more), said)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arranged", [{"recompute": -1}, {"compiled": True, "backend": "eager"}])
def test_layers_computed_twice_or_compiled_give_the_same(family, arranged):
    model = spoken(family)
    streams = [pack(SEQUENCES, WHO), pack(SEQUENCES[:2], ["one"] * 2)]

    def gradients() -> list[torch.Tensor]:
        found = []
        for stream in streams:
            model.zero_grad()
            with running(model, stream):
                targets = targets_of(stream, [[True] * length for length in stream.lengths])
                cross_entropy(model, stream, targets)[0].sum().backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return found

    wanted = gradients()
    arrange(model, **arranged)
    found = gradients()
    as_they_were(model)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


class Largest(TorchDispatchMode):
    """The largest tensor that was made, but for views of what there was."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_is_never_formed(family):
    """No tensor as large as the experts' weights is made, forward or backward."""
    model = spoken(family)
    with running(model, pack(SEQUENCES, WHO)), Largest(model) as largest:
        head_of(model)(hidden_states(model)).square().sum().backward()
    experts = [p.numel() for p in expert_parameters(model).values()]
    assert 0 < largest.elements < min(experts) / 1.5


def test_the_base_keeps_its_own_code_where_nobody_speaks(monkeypatch):
    model = spoken("qwen3_moe")
    kind = type(model.model.layers[0].mlp.experts)
    own, calls = kind.forward, []
    monkeypatch.setattr(kind, "forward", lambda *given: (calls.append(1), own(*given))[1])
    packed(model, pack(SEQUENCES[:2], [None, None]))
    assert len(calls) == 2
    packed(model, pack(SEQUENCES[:2], ["one", None]))
    assert len(calls) == 2
    detach(model, "one")
    alone(model, SEQUENCES[0], "two")
    assert len(calls) == 2
    detach(model)
    assert "forward" not in vars(model.model.layers[0].mlp.experts)
    torch.testing.assert_close(alone(model, SEQUENCES[0], None), alone(made("qwen3_moe"), SEQUENCES[0], None))


def test_a_copy_of_a_model_has_experts_of_its_own():
    model = spoken("mixtral")
    wanted = alone(model, SEQUENCES[0], "one")
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(alone(copied, SEQUENCES[0], "one"), wanted)


def test_factors_of_slots_are_no_experts():
    model = made("mixtral")
    before, paths = list(expert_parameters(model)), expert_paths(model)
    assert paths == before and len(paths) == 4
    assert list(expert_parameters(spoken("mixtral"))) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout 0.1: PEFT has none there; next: --lora-dropout 0"),
        ({"method": "dora"}, "method dora: next: --method lora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa: next: --init-lora-weights kaiming"),
        ({"target_parameters": ["experts.gate"]}, "'experts.gate' matches no parameter of experts"),
        ({"target_parameters": ["q_proj"]}, "'q_proj' matches no parameter of experts"),
        ({"rank_pattern": {"gate_proj": 2}}, "'gate_proj' matches no linear layer"),
    ],
)
def test_what_experts_cannot_have_is_refused_by_name(options, told):
    model = made("mixtral")
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        attach(model, LoraSettings(**{"target_modules": TARGETS, **options}))
    assert not methods_of_any(model)


def methods_of_any(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".slots." in name]


def test_experts_computed_in_a_way_of_their_own_stay_frozen():
    config = config_of("llama4_text", head_dim=8, num_local_experts=2, intermediate_size_mlp=48)
    model, path = model_of(config), "model.layers.0.feed_forward.experts.down_proj"
    told = "down_proj is the experts of a layer, which Llama4TextExperts computes in a way of its own"
    assert expert_paths(model) == [] and path in expert_parameters(model)
    for option in ("target_modules", "target_parameters"):
        with pytest.raises(ConfigError, match=told):
            attach(model, LoraSettings(**{"target_modules": ["q_proj"], option: ["experts.down_proj"]}))
    from veneer.model.swap import check_adaptable

    with pytest.raises(ModelError, match=told):
        check_adaptable(model, path)


def test_names_that_linear_layers_have_mean_these_and_that_is_said():
    config = config_of("qwen2_moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    told = (
        r"'down_proj' names linear layers here; experts.down_proj stays as it is \(--target-parameters experts.down_p"
    )
    with pytest.warns(UserWarning, match=told):
        model = attach(model_of(config), LoraSettings(r=2, target_modules=["down_proj"]))
    assert all("shared_expert" in path for path in methods_of(model, "default"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, LoraSettings(r=2, target_parameters=["experts.down_proj"]), "all")
    assert sum(path.endswith("mlp.experts.down_proj") for path in methods_of(model, "all")) == 2
    assert len(methods_of(model, "all")) == 2 + 2 * 8


def test_ranks_follow_the_patterns():
    options = {
        "rank_pattern": {"gate_up_proj": 5, r"layers.1.mlp.experts.down_proj": 2},
        "alpha_pattern": {"experts.down_proj": 8},
    }
    model = attach(made("mixtral"), LoraSettings(r=3, lora_alpha=6, target_modules=TARGETS, **options))
    methods = methods_of(model, "default")
    found = {path.removeprefix("model.layers."): (m.rank, m.scale) for path, m in methods.items() if "experts" in path}
    assert found == {
        "0.mlp.experts.gate_up_proj": (5, 6 / 5),
        "0.mlp.experts.down_proj": (3, 8 / 3),
        "1.mlp.experts.gate_up_proj": (5, 6 / 5),
        "1.mlp.experts.down_proj": (2, 4),
    }
    a_ERI = methods["model.layers.0.mlp.experts.gate_up_proj"].a_RI
    assert a_ERI.shape == (4, 5, 32) and len(a_ERI[:, 0, 0].unique()) == 4  # each expert starts on its own
