"""Experts in an adapter and in PEFT's folder: names, layout, ranks, and what is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.families import config_of, model_of
from veneer.adapter.attach import attach, methods_of
from veneer.adapter.callback import AdapterCallback
from veneer.adapter.card import Adapter, Card
from veneer.adapter.experts import parameter_of, together
from veneer.adapter.peft_experts import apart, joined
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.errors import AdapterError, WrongBaseError

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 27).reshape(2, 12)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = "model.layers.0.mlp.experts"
MIXTRAL = partial(config_of, "mixtral", num_experts_per_tok=2)


def made(experts: int = 4):
    torch.manual_seed(0)
    return model_of(MIXTRAL(num_local_experts=experts))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def theirs(folder: Path, **config):
    """PEFT's model of random factors, saved to the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(made(), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **config})).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
    return model


def attached(adapter: Adapter, experts: int = 4):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "base unverified")
        return attach(made(experts), adapter)


def changed(folder: Path, tensors: dict | None = None, **config) -> Path:
    """The folder with other tensors and settings; None takes away."""
    held = {**load_file(folder / WEIGHTS), **(tensors or {})}
    save_file({name: t for name, t in held.items() if t is not None}, folder / WEIGHTS, {"format": "pt"})
    told = {**json.loads((folder / CONFIG).read_text()), **config}
    (folder / CONFIG).write_text(json.dumps(told))
    return folder


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS = {
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": BOTH[::-1],
        "rank_pattern": {"gate_up_proj": 5, r"layers\.1\.mlp\.experts\.down_proj": 2, "q_proj": 4},
        "alpha_pattern": {"mlp.experts.down_proj": 7},
    },
    "rslora": {"use_rslora": True, "target_modules": [], "target_parameters": BOTH},
    "one layer": {"target_modules": [], "target_parameters": [f"{EXPERTS}.gate_up_proj"]},
    "short names": {"target_modules": r".*\.(q|v)_proj", "target_parameters": ["gate_up_proj", "experts.down_proj"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_folders_load_and_leave_with_equal_logits(name, tmp_path):
    wanted = logits(theirs(tmp_path / "theirs", **CONFIGS[name]))
    adapter = Adapter.load(tmp_path / "theirs")
    model = attached(adapter)
    scale = wanted.abs().max()
    assert (logits(made()) - wanted).abs().max() > 0.01 * scale
    assert (logits(model) - wanted).abs().max() < 1e-4 * scale
    take(model).save(tmp_path / "ours")
    again = Adapter.load(tmp_path / "ours")
    assert again.identity == take(model).identity and again.card.ranks == adapter.card.ranks
    assert all(torch.allclose(again.tensors[key], adapter.tensors[key]) for key in adapter.tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
        back = peft.PeftModel.from_pretrained(made(), tmp_path / "ours")
    assert (logits(back) - wanted).abs().max() < 1e-4 * scale


def test_each_expert_is_a_module_of_plain_factors(tmp_path):
    model = attach(made(), LoraSettings(r=3, target_modules=["q_proj"], target_parameters=BOTH))
    adapter = take(model)
    modules = [module for module in adapter.modules() if parameter_of(module)]
    assert len(modules) == 2 * 2 * 4 and f"{EXPERTS}.gate_up_proj.3" in modules
    a_RI, b_OR = adapter.factors(f"{EXPERTS}.gate_up_proj.3")
    assert (a_RI.shape, b_OR.shape) == ((3, 32), (96, 3)) and adapter.card.ranks[f"{EXPERTS}.down_proj.0"] == 3
    assert adapter.card.method == "lora" and adapter.card.base is not None
    for path, method in methods_of(attached(adapter), "default").items():
        torch.testing.assert_close(method.tensors(), methods_of(model, "default")[path].tensors())


def test_a_checkpoint_of_trainer_puts_them_back(tmp_path):
    settings = LoraSettings(r=2, target_modules=["q_proj"], target_parameters=BOTH)
    trained, other = attach(made(), settings), attach(made(), settings, seed=1)
    for method in methods_of(trained, "default").values():
        torch.nn.init.normal_(method.b_OR)
    take(trained).save(tmp_path / "adapter")
    kept = {path: (method.a_RI, method.b_OR) for path, method in methods_of(other, "default").items()}
    AdapterCallback()._put_back(other, tmp_path)
    assert torch.equal(logits(other), logits(trained))
    assert all(m.a_RI is kept[p][0] and m.b_OR is kept[p][1] for p, m in methods_of(other, "default").items())
    fewer = attach(made(), LoraSettings(r=3, target_modules=["q_proj"], target_parameters=BOTH))
    with pytest.raises(
        AdapterError, match=r"holds another adapter:(?s:.*)experts.down_proj: checkpoint .*\(4, 2, 48\)"
    ):
        AdapterCallback()._put_back(fewer, tmp_path)


SIZES = st.integers(1, 4)


@settings(max_examples=30)
@given(experts=SIZES, inside=SIZES, outside=SIZES, rank=SIZES)
def test_experts_are_one_pair_and_come_apart_the_same(experts, inside, outside, rank):
    held = {
        f"x.down_proj.{e}": {"a": torch.randn(rank, inside), "b": torch.randn(outside, rank)} for e in range(experts)
    }
    pair = joined(together(held)["x.down_proj"])
    assert pair["a"].shape == (experts * rank, inside) and pair["b"].shape == (outside, rank * experts)
    for module, found in apart("x.down_proj", pair, rank).items():
        assert torch.equal(found["a"], held[module]["a"]) and torch.equal(found["b"], held[module]["b"])


def test_an_expert_of_another_rank_is_refused_by_name(tmp_path):
    theirs(tmp_path, target_modules=[], target_parameters=BOTH)
    adapter, name = Adapter.load(tmp_path), f"{EXPERTS}.down_proj.2"
    a_RI, b_OR = adapter.factors(name)
    more = {f"{name}.a": torch.cat([a_RI, a_RI[:1]]), f"{name}.b": torch.cat([b_OR, b_OR[:, :1]], 1)}
    wider = Adapter({**adapter.tensors, **more}, replace(adapter.card, ranks={**adapter.card.ranks, name: 4}))
    for use in (attached, lambda adapter: adapter.save(tmp_path / "wider")):
        with pytest.raises(AdapterError, match="down_proj has experts of ranks 3, 4, wanted one rank for all of them"):
            use(wider)


INNER = f"base_model.model.{EXPERTS}.base_layer.lora_{{}}.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({}, {"target_parameters": None}, f"target_parameters does not explain: {EXPERTS}.base_layer"),
        ({}, {"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters does not explain"),
        ({}, {"target_parameters": [*BOTH, "q_proj.weight"]}, "only experts' .* are read: 'q_proj.weight'"),
        ({}, {"target_parameters": [1]}, r"target_parameters: got \[1\], wanted a list of names"),
        ({}, {"r": 5}, r"the rank is not that of the tensors: .*gate_up_proj \(config 5, tensors 12\)"),
        ({INNER.format(k): None for k in "AB"}, {}, f"factors are missing: {EXPERTS}.base_layer"),
        ({INNER.format("B"): None}, {}, f"lora_A without lora_B: {EXPERTS}.base_layer"),
    ],
)
def test_folders_that_are_not_whole_are_refused_by_name(tensors, config, told, tmp_path):
    theirs(tmp_path, target_modules=[], target_parameters=BOTH)
    with pytest.raises(AdapterError, match=told):
        Adapter.load(changed(tmp_path, tensors, **config))


@pytest.mark.parametrize(("experts", "told"), [(3, "experts that the model lacks: .*.3"), (6, "has no factors for")])
def test_another_number_of_experts_is_another_base(experts, told, tmp_path):
    theirs(tmp_path, target_modules=[], target_parameters=BOTH)
    with pytest.raises(WrongBaseError, match=told):
        attached(Adapter.load(tmp_path), experts)


def test_a_layer_of_experts_without_factors_is_noticed(tmp_path):
    theirs(tmp_path, target_modules=[], target_parameters=[f"{EXPERTS}.gate_up_proj"])
    adapter = Adapter.load(changed(tmp_path, target_parameters=["gate_up_proj"]))
    with pytest.raises(
        WrongBaseError, match=r"layers that target_parameters means .*: model.layers.1.mlp.experts.gate_up"
    ):
        attached(adapter)


def test_some_experts_of_a_layer_are_no_peft_folder(tmp_path):
    name = f"{EXPERTS}.down_proj.1"
    tensors = {f"{name}.a": torch.ones(2, 48), f"{name}.b": torch.ones(32, 2)}
    adapter = Adapter(tensors, Card("lora", {}, {name: 1.0}, {name: 2}))
    with pytest.raises(AdapterError, match=f"{EXPERTS}.down_proj lacks plain factors for some of its experts"):
        adapter.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(WrongBaseError, match=f"no factors for, though .*: {EXPERTS}.down_proj.0"):
        attached(adapter)
