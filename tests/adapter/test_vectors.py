"""DoRA and LoRA with a bias beside PEFT's: its folders load and ours do there, with equal logits; and what a broken one
says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.adapter.attach import attach, merge_into, methods_of
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.bases.dense import Dense
from veneer.config import LoraSettings
from veneer.errors import AdapterError, NotMergeable
from veneer.methods.dora import DoRA

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 2, 30, 7, 11, 3]])


@pytest.fixture
def peft_folder(pico, tmp_path):
    """A DoRA of PEFT far from its start, and its logits."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_dora=True,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(pico(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        return tmp_path / "theirs", model.eval()(input_ids=IDS).logits


def test_peft_loads_here(pico, peft_folder, tmp_path):
    folder, wanted = peft_folder
    adapter = Adapter.load(folder)
    assert adapter.card.method == "dora" and len(adapter.tensors) == 3 * len(adapter.modules())
    model = pico()
    with pytest.warns(UserWarning, match="base unverified"):
        attach(model, adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=0, atol=2e-5)  # float32, a few layers
        assert (wanted - pico()(input_ids=IDS).logits).abs().max() > 1e-2

    again = take(model)
    again.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(pico(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, wanted, rtol=0, atol=2e-5)
    assert Adapter.load(tmp_path / "ours").identity == again.identity

    merge_into(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=0, atol=2e-5)


def test_gradients_are_pefts(pico):
    """To the rounding of norms taken of the whole sum and of its parts, in float32."""
    torch.manual_seed(1)
    layer = nn.Linear(24, 16, bias=False)
    theirs = peft.get_peft_model(
        nn.ModuleDict({"one": layer}), peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["one"])
    ).base_model.model["one"]
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    b.data.normal_()
    m = theirs.lora_magnitude_vector["default"].weight
    ours = DoRA(a.detach().clone(), b.detach().clone(), m.detach().clone() * 1.1, 2.0)
    m.data *= 1.1
    base, x = Dense(layer.weight), torch.randn(9, 24)
    theirs(x).square().sum().backward()
    y = base.matmul(x)
    (y + ours.delta(x, y, base)).square().sum().backward()
    for mine, their in ((ours.a_RI, a), (ours.b_OR, b), (ours.m_O, m)):
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-4)


def test_each_row_of_a_stream_hears_its_own_dora(pico):
    """Packed, two slots of two kinds: the logits of each row alone."""
    from veneer.model.load import prepare
    from veneer.model.losses import sequence_nll

    model = pico()
    prepare(model)
    for name, method in (("one", "dora"), ("two", "lora")):
        attach(model, LoraSettings(r=2, method=method), name, seed=3)
        for held in methods_of(model, name).values():
            held.b_OR.data.normal_(std=0.2)
    assert all(isinstance(method, DoRA) for method in methods_of(model, "one").values())
    rows = [example(length) for length in (5, 9, 3)]
    for slot in ("one", "two", None):
        alone = [sequence_nll(model, [row], slot)[0] for row in rows]
        for got, wanted in zip(sequence_nll(model, rows, slot), alone, strict=True):
            assert got[0] == pytest.approx(wanted[0], rel=1e-4)


def example(length):
    from veneer.data.chat import Example

    ids = tuple((7 * i + length) % 40 for i in range(length))
    return Example(ids, tuple(i > 0 for i in range(length)), 0, 0)


@pytest.mark.parametrize("options, method", [({"lora_bias": True}, "biased"), ({"bias": "lora_only"}, "rebiased")])
def test_adapters_with_a_bias_load_train_on_and_leave(options, method, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def made():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
        return model

    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], **options)
    theirs = peft.get_peft_model(made(), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model, adapter = made(), Adapter.load(tmp_path / "theirs")
    assert adapter.card.method == method
    with pytest.warns(UserWarning, match="base unverified"):
        attach(model, adapter)
    take(model).save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(made(), tmp_path / "ours").eval()
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits
        for found in (model, again):
            torch.testing.assert_close(found(input_ids=IDS).logits, wanted, rtol=0, atol=2e-5)
    with pytest.raises(NotMergeable, match="learned a bias"):
        merge_into(model)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("no flag", "use_dora: got False, but adapter_model.safetensors has its lora_magnitude_vector"),
        ("no magnitudes", "has no lora_magnitude_vector"),
        ("one lacks", "factors without lora_magnitude_vector"),
        ("another length", "shapes do not chain"),
        ("flag is text", "use_dora: got 'yes', wanted true or false"),
    ],
)
def test_a_broken_dora_says_what_is_wrong(peft_folder, fault, message):
    folder, _ = peft_folder
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    magnitudes = [key for key in tensors if key.endswith("magnitude_vector")]
    config["use_dora"] = {"no flag": False, "flag is text": "yes"}.get(fault, True)
    for key in {"no magnitudes": magnitudes, "one lacks": magnitudes[:1]}.get(fault, []):
        del tensors[key]
    if fault == "another length":
        tensors[magnitudes[0]] = torch.ones(3)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        Adapter.load(folder)
