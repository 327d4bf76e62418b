"""Adapters on families whose layers are not plain linear ones, or are not all of the model: ours against PEFT's."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.families import config_of, gemma3, gpt2, llava, model_of, qwen2_vl
from veneer.adapter.attach import attach, detach, merge_into, methods_of
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.adapter.targets import find_targets
from veneer.config import LoraSettings
from veneer.errors import ConfigError, ModelError
from veneer.model.losses import cross_entropy, targets_of
from veneer.model.packed import hidden_states, running
from veneer.model.stream import pack

# family -> (its config, target_modules, target_parameters if any)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NO_YARN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
FAMILIES = {
    "gpt2": (gpt2, ["c_attn", "mlp.c_proj"]),
    "mixtral": (partial(config_of, "mixtral", num_local_experts=4, num_experts_per_tok=2), ["q_proj", "o_proj"]),
    "qwen2_moe": (
        partial(config_of, "qwen2_moe", shared_expert_intermediate_size=16, **EXPERTS),
        ["q_proj", "shared_expert.up_proj", "shared_expert_gate"],
    ),
    "mixtral, experts": (partial(config_of, "mixtral", num_local_experts=4, num_experts_per_tok=2), ["q_proj"], BOTH),
    "qwen3_moe, experts": (partial(config_of, "qwen3_moe", **EXPERTS), [], BOTH),
    "gpt_oss, experts": (
        partial(
            config_of, "gpt_oss", head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, **NO_YARN
        ),
        ["o_proj"],
        BOTH,
    ),
    "qwen2_moe, experts": (
        partial(config_of, "qwen2_moe", shared_expert_intermediate_size=16, **EXPERTS),
        ["shared_expert.down_proj"],
        ["experts.down_proj"],
    ),
    "gemma3": (gemma3, ["q_proj", "down_proj"]),
    "llava": (llava, ["q_proj", "down_proj"]),
    "qwen2_vl": (qwen2_vl, ["q_proj", "down_proj"]),
}
IDS = torch.arange(3, 27).reshape(2, 12)


def made(family: str) -> nn.Module:
    torch.manual_seed(0)
    return model_of(FAMILIES[family][0]())


def targets(family: str) -> dict[str, list[str]]:
    """What to adapt, as options of ours and of PEFT."""
    return dict(zip(("target_modules", "target_parameters"), FAMILIES[family][1:], strict=False))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(family: str) -> nn.Module:
    """With a slot that is far from zero."""
    model = attach(made(family), LoraSettings(r=3, lora_alpha=5, **targets(family)))
    generator = torch.Generator().manual_seed(1)
    for method in methods_of(model, "default").values():
        method.b_OR.data = torch.randn(method.b_OR.shape, generator=generator) * 0.2
    return model


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def by_peft(model: nn.Module, folder) -> nn.Module:
    """PEFT's model of the folder; whatever it warns of is an error."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT calls transformers by an old name
        return peft.PeftModel.from_pretrained(model, folder)


# Two layers in float32: see TIGHT in tests/model/test_packed.py.
TIGHT = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_families_saved_are_computed_by_peft(family, tmp_path):
    model = adapted(family)
    take(model).save(tmp_path)
    wanted = logits(model)
    assert off(logits(made(family)), wanted) > 0.01
    assert off(logits(by_peft(made(family), tmp_path)), wanted) < TIGHT


@pytest.mark.parametrize("family", FAMILIES)
def test_families_saved_by_peft_are_computed_by_us(family, tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(made(family), peft.LoraConfig(r=3, lora_alpha=5, **targets(family)))
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        theirs.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "base unverified")
        ours = attach(made(family), adapter)
    assert off(logits(ours), logits(theirs.eval())) < TIGHT
    take(ours).save(tmp_path / "again")
    assert off(logits(by_peft(made(family), tmp_path / "again")), logits(theirs)) < TIGHT


@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_the_names_and_layout_of_their_weights(family, tmp_path):
    model = made(family)
    model.save_pretrained(tmp_path / "before")
    before, held = load_file(tmp_path / "before" / "model.safetensors"), {p.data_ptr() for p in model.parameters()}
    attach(model, LoraSettings(r=3, **targets(family)))
    assert held <= {p.data_ptr() for p in model.parameters()}  # nothing was copied
    model.save_pretrained(tmp_path / "after")
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.load_state_dict({name: 2 * value for name, value in made(family).state_dict().items()})
    twice = made(family)
    twice.load_state_dict({name: 2 * value for name, value in twice.state_dict().items()})
    assert torch.equal(logits(model), logits(twice))  # B = 0
    detach(model)
    assert {name: type(m) for name, m in model.named_modules()} == {n: type(m) for n, m in twice.named_modules()}
    assert torch.equal(logits(model), logits(twice))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_merged_equal_base_and_adapter(family, tmp_path):
    model = adapted(family)
    wanted = logits(model)
    merge_into(model).save_pretrained(tmp_path)
    assert off(logits(type(model).from_pretrained(tmp_path)), wanted) < TIGHT


@pytest.mark.parametrize("family", FAMILIES)
def test_families_learn(family):
    """A few steps of plain gradient descent lower the loss of two packed segments."""
    model = attach(made(family), LoraSettings(r=4, **targets(family)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    stream, losses = pack(IDS.tolist(), ["default"] * 2), []
    for _ in range(4):
        with running(model, stream):
            sums_N, counts_N = cross_entropy(model, stream, targets_of(stream, [[True] * 12] * 2))
            (sums_N.sum() / counts_N.sum()).backward()
        losses.append(sums_N.sum().item())
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.95 * losses[0]


def test_families_all_linear_of_gpt2_is_all_but_the_head():
    found = find_targets(made("gpt2"), LoraSettings())
    assert len(found) == 8 and not any("head" in path for path in found)


@pytest.mark.parametrize(
    "family, told",
    [
        ("mixtral", r"all-linear: experts.down_proj, experts.gate_up_proj \(4 in a layer, \d\d% of this model's"),
        ("qwen2_moe", r"all-linear: experts.down_proj, experts.gate_up_proj \(4 in a layer"),
        ("gemma3", r"all-linear: of vision_tower nothing is adapted \(\d layers\)"),
        ("llava", r"all-linear: of multi_modal_projector, vision_tower nothing is adapted"),
        ("qwen2_vl", r"all-linear: of visual nothing is adapted"),
    ],
)
def test_families_all_linear_says_what_it_leaves_out(family, told):
    with pytest.warns(UserWarning, match=told):
        model = attach(made(family), LoraSettings())
    found = list(methods_of(model, "default"))
    assert found and all(("language_model" in path) == (family in ("gemma3", "llava", "qwen2_vl")) for path in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, LoraSettings(target_modules=["q_proj"]), "named")


@pytest.mark.parametrize(
    "family, target, why",
    [
        ("gpt2", "wpe", "transformer.wpe is an embedding of something else than tokens"),
        ("mixtral", "gate_proj", ""),
        ("llava", "multi_modal_projector.linear_1", "linear_1 is not of the language model"),
    ],
)
def test_families_targets_that_are_no_linear_layers_are_refused_by_name(family, target, why):
    with pytest.raises(ConfigError, match=f"'{target}' matches no linear layer.*{why}"):
        attach(made(family), LoraSettings(target_modules=[target]))


@pytest.mark.parametrize("longest", [64, 65])
def test_families_with_learned_positions_have_no_more_than_these(longest):
    model = attach(made("gpt2"), LoraSettings(r=2, target_modules=["c_attn"]))
    stream = pack([[3] * 5, [4] * longest, [5] * 60], ["default"] * 3)
    if longest == 64:
        with running(model, stream):
            assert hidden_states(model).isfinite().all()
        return
    with pytest.raises(ModelError, match=r"65 tokens.*positions for 64.*--max-length 64"), running(model, stream):
        pass
