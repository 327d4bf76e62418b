"""Adapters on and off a model: slots, targets, identity, and a model that stays what it was."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import veneer
from veneer.adapter.attach import attach, detach, merge_into, methods_of
from veneer.adapter.card import Adapter
from veneer.adapter.patterns import matched
from veneer.adapter.take import take
from veneer.adapter.targets import find_targets
from veneer.config import LoraSettings
from veneer.errors import AdapterError, ConfigError, ModelError, VeneerError, WrongBaseError
from veneer.model.leaf import Leaf
from veneer.model.packed import running, speaking, wiring_of
from veneer.model.stream import pack

IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def randomise(model, name: str = "default", seed: int = 0) -> None:
    """B far from zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for method in methods_of(model, name).values():
        method.b_OR.data = torch.randn(method.b_OR.shape, generator=generator) * 0.2


def types(model) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


# On and off.


def test_the_same_object_comes_back_and_starts_as_the_base(pico):
    model = pico()
    before = logits(model)
    assert attach(model, LoraSettings(r=4)) is model
    # B = 0 adds exact zeros, but the products run in another order than nn.Linear's only where there is a bias: none.
    assert torch.equal(logits(model), before)
    assert len(methods_of(model, "default")) == 14
    trainable = {path for path, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{path}.slots.default.{f}" for path in methods_of(model, "default") for f in ("a_RI", "b_OR")}


def test_detach_gives_back_the_very_model(pico):
    model = pico()
    kinds, parameters, before = types(model), dict(model.named_parameters()), logits(model)
    attach(model, LoraSettings(r=4))
    attach(model, LoraSettings(r=2), "second")
    randomise(model)
    assert not torch.equal(logits(model), before)
    assert detach(model) is model
    assert types(model) == kinds
    after = dict(model.named_parameters())
    assert list(after) == list(parameters) and all(after[name] is parameters[name] for name in parameters)
    assert torch.equal(logits(model), before)
    assert wiring_of(model).slots == [] and wiring_of(model).voice is None
    attach(model, LoraSettings(r=4))  # and all over again


def test_training_mode_survives_both_ways(pico):
    for mode in (True, False):
        model = pico().train(mode)
        attach(model, LoraSettings(r=2))
        assert all(module.training is mode for path, module in model.named_modules() if ".slots." not in path)
        detach(model)
        assert all(module.training is mode for module in model.modules())


def test_a_second_name_fills_a_second_slot_without_swapping_again(pico):
    model = pico()
    attach(model, LoraSettings(r=4, target_modules=["q_proj", "v_proj"]))
    leaves = {path: module for path, module in model.named_modules() if isinstance(module, Leaf)}
    first = methods_of(model, "default")
    attach(model, LoraSettings(r=2, target_modules=["q_proj", "o_proj"]), "second")
    after = {path: module for path, module in model.named_modules() if isinstance(module, Leaf)}
    assert all(after[path] is leaf for path, leaf in leaves.items()) and len(after) == 6
    assert all(methods_of(model, "default")[path] is method for path, method in first.items())
    assert set(methods_of(model, "second")) == {
        f"model.layers.{i}.self_attn.{k}" for i in (0, 1) for k in ("q_proj", "o_proj")
    }
    assert wiring_of(model).slots == ["default", "second"] and wiring_of(model).voice == "default"


def test_detach_of_one_leaves_the_other_and_hands_the_voice_on(pico):
    model = pico()
    for name in ("one", "two"):
        attach(model, LoraSettings(r=2), name)
        randomise(model, name, seed=len(name) + ord(name[0]))
    with speaking(model, "two"):
        two = logits(model)
    detach(model, "one")
    assert wiring_of(model).voice == "two" and torch.equal(logits(model), two)
    with pytest.raises(AdapterError, match="no adapter named 'one' is attached; attached are: two"):
        methods_of(model, "one")


@pytest.mark.parametrize("ask", [detach, take, merge_into, methods_of])
def test_a_name_that_is_not_attached(pico, ask):
    with pytest.raises(AdapterError, match="'nobody' is attached; attached are: none"):
        ask(pico(), "nobody")


def test_detach_of_an_untouched_model_does_nothing(pico):
    model = pico()
    kinds = types(model)
    assert types(detach(model)) == kinds


@pytest.mark.parametrize("name", ["", "a.b", "."])
def test_names_that_no_slot_can_have(pico, name):
    with pytest.raises(ConfigError, match="an adapter's name is 1 to 64"):
        attach(pico(), LoraSettings(), name)


@pytest.mark.parametrize("name", ["keys", "train", "type", "items"])
def test_names_that_mean_something_to_torch(pico, name):
    """An adapter folder may well be called `train`: it works, or is refused with nothing half done."""
    model = pico()
    kinds = types(model)
    try:
        attach(model, LoraSettings(r=2), name)
    except VeneerError:
        assert types(model) == kinds and wiring_of(model).slots == []
    else:
        assert len(methods_of(model, name)) == 14


def test_a_taken_name_is_refused_and_nothing_changes(pico):
    model = pico()
    attach(model, LoraSettings(r=2))
    held = methods_of(model, "default")
    with pytest.raises(AdapterError, match=r"'default' is attached already; next: veneer\.detach"):
        attach(model, LoraSettings(r=4))
    assert all(methods_of(model, "default")[path] is method for path, method in held.items())


def test_a_refused_attach_leaves_the_model_as_it_was(pico):
    """A layer of an unknown kind in the middle: all or nothing."""

    class Odd(nn.Linear):
        pass

    model = pico()
    odd = Odd(32, 64, bias=False)
    model.model.layers[1].mlp.up_proj = odd
    kinds, before = types(model), logits(model)
    with pytest.raises(VeneerError, match=r"layers\.1\.mlp\.up_proj is a Odd|layers\.1\.mlp\.up_proj.*Odd"):
        attach(model, LoraSettings(r=2))
    assert types(model) == kinds and wiring_of(model).slots == []
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), before)
    with pytest.raises(AdapterError):
        methods_of(model, "default")


# Settings.


def test_ranks_scales_and_patterns(pico):
    model = pico()
    asked = LoraSettings(
        r=4,
        lora_alpha=12,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
        alpha_pattern={"v_proj": 40, "model.layers.0.self_attn.q_proj": 3},
    )
    attach(model, asked)
    found = {path: (method.rank, method.scale) for path, method in methods_of(model, "default").items()}
    assert found["model.layers.0.self_attn.k_proj"] == (4, 3.0)
    assert found["model.layers.0.self_attn.q_proj"] == (2, 1.5)
    assert found["model.layers.1.self_attn.q_proj"] == (2, 6.0)
    assert found["model.layers.0.self_attn.v_proj"] == (4, 10.0)
    assert found["model.layers.1.mlp.up_proj"] == (8, 1.5)
    assert found["model.layers.0.mlp.up_proj"] == (4, 3.0)


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({"r": 4, "lora_alpha": 12}, 3.0),
        ({"r": 4, "lora_alpha": 12, "use_rslora": True}, 6.0),
        ({"r": 4, "lora_alpha": 12, "use_rslora": True, "scale": 0.25}, 0.25),
    ],
)
def test_the_scale_is_alpha_by_r_by_its_root_or_given(pico, settings, scale):
    model = pico()
    attach(model, LoraSettings(**settings, target_modules=["q_proj"]))
    assert [method.scale for method in methods_of(model, "default").values()] == [scale] * 2
    randomise(model)
    adapter = take(model)
    method = next(iter(methods_of(model, "default").values()))
    a_RI, b_OR = adapter.factors("model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(b_OR @ a_RI, scale * (method.b_OR @ method.a_RI).detach())
    assert set(adapter.card.scales.values()) == {scale}


def test_all_linear_is_all_but_the_head(pico):
    found = find_targets(pico(), LoraSettings())
    assert len(found) == 14 and {path.rpartition(".")[2] for path in found} == set(KINDS)
    assert len(find_targets(pico(tie_word_embeddings=True), LoraSettings())) == 14


def test_targets_stay_the_same_once_swapped(pico):
    model = pico()
    before = find_targets(model, LoraSettings())
    attach(model, LoraSettings(target_modules=["q_proj"]))
    assert find_targets(model, LoraSettings()) == before


@pytest.mark.parametrize(
    "targets, excluded, kinds",
    [
        (["q_proj", "v_proj"], [], {"q_proj", "v_proj"}),
        ("all-linear", ["mlp.up_proj", "gate_proj", "down_proj"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["self_attn.q_proj"], [], {"q_proj"}),
        ([r"self_attn\.[qk]_proj"], [], {"q_proj", "k_proj"}),
        ([r"layers\.\d+\.mlp\..*"], ["down_proj"], {"gate_proj", "up_proj"}),
    ],
)
def test_targets_by_end_of_name_or_expression(pico, targets, excluded, kinds):
    found = find_targets(pico(), LoraSettings(target_modules=targets, exclude_modules=excluded))
    assert {path.rpartition(".")[2] for path in found} == kinds and len(found) == 2 * len(kinds)


def test_a_whole_path_is_one_layer(pico):
    path = "model.layers.1.self_attn.q_proj"
    assert find_targets(pico(layers=12), LoraSettings(target_modules=[path])) == [path]


@given(path=st.sampled_from([f"model.layers.{i}.self_attn.q_proj" for i in (1, 10, 11)]), end=st.integers(0, 4))
def test_every_end_of_a_path_at_a_dot_names_it(path, end):
    assert matched(".".join(path.split(".")[end:]), [path])
    assert not matched(path.split(".")[-1][1:], [path])  # not at a dot
    assert bool(matched("layers.1.self_attn.q_proj", [path])) == (".1." in path)


def test_targets_that_match_nothing_are_all_named_with_near_misses(pico):
    with pytest.raises(ConfigError) as caught:
        attach(pico(), LoraSettings(target_modules=["q_porj", "v_proj", "c_attn"]))
    text = str(caught.value)
    assert "target_modules" in text and "'q_porj' matches no linear layer; did you mean 'q_proj'" in text
    assert "'c_attn' matches no linear layer" in text and "'v_proj' matches" not in text
    assert all(kind in text for kind in KINDS)


@pytest.mark.parametrize("option", ["exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_named_with_its_option(pico, option):
    value = ["q_porj"] if option == "exclude_modules" else {"q_porj": 2}
    with pytest.raises(ConfigError, match=rf"{option}:\n.*'q_porj' matches no linear layer; did you mean 'q_proj'"):
        attach(pico(), LoraSettings(**{option: value}))


def test_everything_excluded(pico):
    with pytest.raises(ConfigError, match="no linear layer is left"):
        attach(pico(), LoraSettings(target_modules=["q_proj"], exclude_modules=["self_attn.q_proj"]))


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["q_proj(", "[", "*"])
def test_a_pattern_that_is_no_expression(pico, option, pattern):
    value = {pattern: 2} if option == "rank_pattern" else [pattern]
    with pytest.raises(ConfigError, match=re.escape(pattern)):
        attach(pico(), LoraSettings(**{option: value}))


def test_starts_depend_on_seed_and_path_alone(pico):
    """Not on what else is adapted, nor on torch's own generator."""
    whole = attach(pico(), LoraSettings(r=4), seed=3)
    torch.manual_seed(99)
    part = attach(pico(), LoraSettings(r=4, target_modules=["v_proj"]), seed=3)
    other = attach(pico(), LoraSettings(r=4), seed=4)
    path = "model.layers.1.self_attn.v_proj"
    start = methods_of(whole, "default")[path].a_RI
    assert torch.equal(start, methods_of(part, "default")[path].a_RI)
    assert not torch.equal(start, methods_of(other, "default")[path].a_RI)
    assert not torch.equal(start, methods_of(whole, "default")["model.layers.0.self_attn.v_proj"].a_RI)


def test_factors_are_float32_on_a_bfloat16_base(pico):
    model = attach(pico().bfloat16(), LoraSettings(r=4, lora_dropout=0.25))
    for method in methods_of(model, "default").values():
        assert method.a_RI.dtype == method.b_OR.dtype == torch.float32 and method.dropout == 0.25


# Values.


def test_take_reads_without_touching(pico):
    model = attach(pico(), LoraSettings(r=4))
    randomise(model)
    before = logits(model)
    adapter = take(model, base_name="tiny", training={"steps": 3})
    assert adapter.card.veneer_version == veneer.__version__ or veneer.__version__ == "unknown"
    assert sorted(adapter.modules()) == sorted(methods_of(model, "default"))
    assert (
        adapter.card.base_name == "tiny"
        and adapter.card.training == {"steps": 3}
        and adapter.card.storage == "dense float32"
    )
    assert set(adapter.card.ranks.values()) == {4} and adapter.card.base.architecture != "unknown"
    assert torch.equal(logits(model), before)
    for method in methods_of(model, "default").values():  # a value: what happens later is none of its business
        method.b_OR.data.zero_()
    assert all(adapter.factors(path)[1].any() for path in adapter.modules())


# 32/16, 32/√8, 8/12 and a learned-by-hand one: two of them are no powers of two.
@pytest.mark.parametrize("scale", [2.0, 32 / 8**0.5, 2 / 3, 0.3])
def test_take_after_attach_has_the_same_identity(pico, scale):
    """A value that goes through a model untrained is the same value: same bytes, same identity."""
    model = attach(pico(), LoraSettings(r=4, scale=scale))
    randomise(model)
    adapter = take(model)
    again = take(attach(pico(), adapter))
    assert again.identity == adapter.identity
    assert again.card.scales == adapter.card.scales and again.card.ranks == adapter.card.ranks


@settings(max_examples=20)
@given(scale=st.floats(1e-3, 1e3), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_an_adapter_acts_on_its_new_model_as_on_the_old(scale, rank, seed):
    model = attach(make_pico(), LoraSettings(r=rank, scale=scale, target_modules=["q_proj", "down_proj"]))
    randomise(model, seed=seed)
    for method in methods_of(model, "default").values():
        method.b_OR.data /= scale  # so that the update stays of the size of the weights
    other = attach(make_pico(), take(model))
    assert torch.allclose(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    assert [m.scale for m in methods_of(other, "default").values()] == [scale] * 4  # training can go on as it was


def make_pico() -> LlamaForCausalLM:
    from transformers import LlamaConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
        )
        return LlamaForCausalLM(config).eval()


def test_through_a_folder_and_back(pico, tmp_path):
    model = attach(pico(), LoraSettings(r=4, lora_alpha=8))
    randomise(model)
    adapter = take(model)
    loaded = Adapter.load(adapter.save(tmp_path / "a"))
    other = attach(pico(), loaded)
    torch.testing.assert_close(logits(other), logits(model))
    assert take(other).identity == adapter.identity


def test_an_adapter_of_another_base_is_refused_and_nothing_changes(pico, adapter_for):
    model = pico()
    kinds = types(model)
    with pytest.raises(WrongBaseError, match="does not belong on this base"):
        attach(model, take(attach(pico(layers=3), LoraSettings(r=2))))
    with pytest.raises(WrongBaseError, match="another shape"):
        attach(model, adapter_for(pico(hidden=64)))
    assert types(model) == kinds and wiring_of(model).slots == []
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_without_a_card_attaches_as_unverified(pico, adapter_for):
    model = pico()
    before = logits(model)
    adapter = adapter_for(model, ranks={"model.layers.1.mlp.up_proj": 3})
    attach(model, adapter)
    assert list(methods_of(model, "default")) == ["model.layers.1.mlp.up_proj"]
    a_RI, b_OR = adapter.factors("model.layers.1.mlp.up_proj")
    oracle = pico()
    oracle.model.layers[1].mlp.up_proj.weight.data += b_OR @ a_RI
    torch.testing.assert_close(logits(model), logits(oracle))
    assert not torch.allclose(logits(model), before, atol=1e-6)


# The model as others see it.


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_writes_the_base_as_it_was(pico, tmp_path, tied):
    model = pico(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "before")
    attach(model, LoraSettings(r=4))
    attach(model, LoraSettings(r=2), "second")
    randomise(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert list(before) == list(after)
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert (tmp_path / "before" / "config.json").read_text() == (tmp_path / "after" / "config.json").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    with speaking(model, None):
        torch.testing.assert_close(logits(model), logits(reloaded))


def test_save_pretrained_in_shards(pico, tmp_path):
    model = attach(pico(), LoraSettings(r=4))
    randomise(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with speaking(model, None):
        torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(pico, assign):
    model, other = pico(), pico(seed=1)
    wanted = logits(other)
    attach(model, LoraSettings(r=4))
    randomise(model)
    adapted = take(model).identity
    assert list(model.state_dict()) == list(other.state_dict())
    result = model.load_state_dict(other.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    with speaking(model, None):
        torch.testing.assert_close(logits(model), wanted)
    assert take(model).tensors.keys() and take(model).identity == adapted  # slots are not part of the model's state
    pico(seed=2).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_an_adapted_model_are_whole_and_separate(pico, again):
    model = attach(pico(), LoraSettings(r=4))
    attach(model, LoraSettings(r=2), "second")
    randomise(model)
    wanted = logits(model)
    other = again(model)
    assert torch.equal(logits(other), wanted)
    with speaking(other, None):
        assert torch.equal(logits(model), wanted)  # the copy's voice is its own
        assert not torch.equal(logits(other), wanted)
    with running(other, pack([[1, 2]], ["second"])):
        assert wiring_of(model).stream is None
    detach(other)
    assert torch.equal(logits(model), wanted) and len(methods_of(model, "second")) == 14


def test_transformers_generates_with_the_voice(pico):
    model = pico()
    for parameter in model.parameters():
        parameter.data *= 10 if parameter.dim() > 1 else 1
    attach(model, LoraSettings(r=4))
    randomise(model)
    adapted = model.generate(IDS, max_new_tokens=6, do_sample=False)
    for step in range(6):
        assert adapted[0, IDS.shape[1] + step] == model(adapted[:, : IDS.shape[1] + step]).logits[0, -1].argmax()
    with speaking(model, None):
        assert not torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), adapted)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_ordinary_training_step_moves_the_adapter_alone(pico, autocast):
    """As transformers.Trainer makes it, with bf16=True under autocast."""
    model = attach(pico(), LoraSettings(r=4)).train()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def test_gradient_checkpointing_of_an_ordinary_call(pico):
    """Frozen embeddings: the non-reentrant kind, transformers' default, still reaches the adapter."""
    gradients = []
    for checkpointing in (False, True):
        model = attach(pico(), LoraSettings(r=4)).train()
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([method.a_RI.grad for method in methods_of(model, "default").values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_into_gives_the_adapters_logits_and_takes_it_off(pico, dtype):
    model = attach(pico().to(dtype), LoraSettings(r=4, scale=0.7))
    randomise(model)
    wanted = {path: m.base.weight.float() + 0.7 * m.slots["default"].b_OR @ m.slots["default"].a_RI
              for path, m in model.named_modules() if isinstance(m, Leaf)}  # fmt: skip
    adapted = logits(model).float()
    assert merge_into(model) is model
    assert wiring_of(model).slots == [] and wiring_of(model).voice is None
    for path, weight_OI in wanted.items():  # in float32, rounded once
        stored = model.get_submodule(path).weight
        assert stored.dtype == dtype
        ulp = {torch.float32: 2**-22, torch.bfloat16: 2**-8}[dtype]
        assert ((stored.float() - weight_OI).abs() <= ulp * weight_OI.abs() + 1e-7).all()
    # float32: another order of sums; bfloat16: weights rounded to 2⁻⁹ in 4 layers' worth of products.
    assert (logits(model).float() - adapted).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.05}[
        dtype
    ] * adapted.abs().max()
    detach(model)
    torch.testing.assert_close(logits(model).float(), adapted, rtol=0.05, atol=0.05 * adapted.abs().max().item())


def test_merging_one_of_two_keeps_the_other_on_the_new_base(pico):
    model = pico()
    for name in ("one", "two"):
        attach(model, LoraSettings(r=2), name)
        randomise(model, name, seed=ord(name[0]))
    other = methods_of(model, "two")
    merge_into(model, "one")
    assert wiring_of(model).slots == ["two"] and all(methods_of(model, "two")[p] is m for p, m in other.items())
    oracle = pico()
    for name in ("one", "two"):
        attach(oracle, LoraSettings(r=2), name)
        randomise(oracle, name, seed=ord(name[0]))
        merge_into(oracle, name)
    torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-4, atol=1e-5)


def test_a_merged_model_is_another_base(pico):
    """An adapter taken before must not pass for one of the merged weights."""
    model = attach(pico(), LoraSettings(r=2))
    randomise(model)
    merge_into(model)
    attach(model, LoraSettings(r=2))
    assert take(model).card.base.weights == "unknown"


def test_what_cannot_be_merged_is_refused_before_anything_changes(pico):
    from veneer.errors import NotMergeable
    from veneer.methods.base import Method

    model = attach(pico(), LoraSettings(r=2))
    randomise(model)
    leaf = model.get_submodule("model.layers.1.mlp.up_proj")
    leaf.slots["default"] = Method()  # the contract's default: no merged form
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotMergeable, match="no exact merged form"):
        merge_into(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert wiring_of(model).slots == ["default"]


def test_a_linear_layer_of_a_kind_of_its_own_is_refused(pico):
    """A subclass may compute something else: one clear message, not an adapter on a plain product."""

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    model = pico()
    model.model.layers[1].mlp.up_proj = Odd(32, 64, bias=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj is a Odd"):
        attach(model, LoraSettings(r=2))
    assert not any(isinstance(module, Leaf) for module in model.modules())
