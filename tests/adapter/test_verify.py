"""Every way of putting an adapter on a wrong base, with and without a card."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from veneer.adapter.card import Adapter
from veneer.adapter.verify import check_base
from veneer.errors import WrongBaseError
from veneer.model import fingerprint
from veneer.model.fingerprint import UNKNOWN

TOKENS = {"tokenizer": "7" * 64, "template": "8" * 64}


@pytest.fixture
def saved(tmp_path, pico):
    """A function that makes a model on disk and loads it back: (model, fingerprint with a tokenizer)."""

    def make(seed: int = 0, **settings):
        model = settings.pop("model", None) or pico(seed, **settings)
        folder = tmp_path / f"{seed}-{settings}-{type(model).__name__}"
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
        return loaded, dataclasses.replace(fingerprint.of(loaded), **TOKENS)

    return make


@pytest.fixture
def home(saved, adapter_for):
    """(model, its fingerprint, an adapter that was trained on it)."""
    model, print_ = saved()
    return model, print_, adapter_for(model, base=print_, base_name="pico")


def peft_adapter(adapter: Adapter, tmp_path, **config) -> Adapter:
    """The same factors as a foreign folder without a card, with PEFT's usual targets."""
    folder = adapter.save(tmp_path / "foreign")
    (folder / "veneer.json").unlink()
    names = sorted({module.rpartition(".")[2] for module in adapter.modules()})
    whole = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(whole | {"target_modules": names} | config))
    return Adapter.load(folder)


def refusal(adapter, model, print_) -> str:
    with pytest.raises(WrongBaseError) as caught:
        check_base(adapter, model, print_)
    return str(caught.value)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64))


def test_the_right_base_passes_without_a_word(home):
    model, print_, adapter = home
    assert check_base(adapter, model, print_) == []


def test_storage_is_no_difference(home):
    model, _, adapter = home
    narrow = type(model).from_pretrained(model.name_or_path, dtype=torch.bfloat16)
    assert check_base(adapter, narrow, dataclasses.replace(fingerprint.of(narrow), **TOKENS)) == []


# The rows of PEFT's table: what it loads without a warning, with one, or fails on with a traceback.


def test_same_architecture_other_weights(home, saved):
    text = refusal(home[2], *saved(seed=1))
    assert "weights: adapter" in text and "architecture" not in text and "'pico'" in text


def test_one_weight_changed_on_disk(home, tmp_path):
    model, _, adapter = home
    with torch.no_grad():
        model.model.norm.weight[3] += 0.5
    model.save_pretrained(tmp_path / "tuned")
    tuned = type(model).from_pretrained(tmp_path / "tuned")
    assert "weights" in refusal(adapter, tuned, dataclasses.replace(fingerprint.of(tuned), **TOKENS))


@pytest.mark.parametrize("with_card", [True, False])
def test_fewer_layers(home, saved, tmp_path, with_card):
    adapter = home[2] if with_card else peft_adapter(home[2], tmp_path)
    text = refusal(adapter, *saved(layers=1))
    assert "linear layers that the model lacks: model.layers.1." in text
    assert ("architecture" in text) == with_card


@pytest.mark.parametrize("with_card", [True, False])
def test_more_layers(home, saved, tmp_path, with_card):
    adapter = home[2] if with_card else peft_adapter(home[2], tmp_path)
    text = refusal(adapter, *saved(layers=3))
    assert ("architecture" in text) if with_card else ("has no factors for: model.layers.2.mlp.down_proj" in text)


def test_more_layers_where_the_targets_are_an_expression(home, saved, tmp_path):
    adapter = peft_adapter(home[2], tmp_path, target_modules=r"model\.layers\.\d+\..*_proj")
    assert "has no factors for: model.layers.2." in refusal(adapter, *saved(layers=3))
    assert len(check_base(adapter, *home[:2])) == 1


def test_layers_left_out_on_purpose_are_no_sign_of_another_base(home, tmp_path):
    chosen = peft_adapter(home[2], tmp_path, layers_to_transform=[0, 1])
    assert len(check_base(chosen, *home[:2])) == 1
    excluded = peft_adapter(home[2], tmp_path, target_modules="all-linear")
    assert len(check_base(excluded, *home[:2])) == 1


def test_an_expression_that_is_not_read_is_a_note_not_a_wait(home, tmp_path):
    adapter = peft_adapter(home[2], tmp_path, target_modules="(?i)(a+)+b")
    assert any("target_modules not compared" in note for note in check_base(adapter, *home[:2]))


@pytest.mark.parametrize("with_card", [True, False])
def test_another_hidden_size(home, saved, tmp_path, with_card):
    adapter = home[2] if with_card else peft_adapter(home[2], tmp_path)
    text = refusal(adapter, *saved(hidden=48))
    assert "model.layers.0.self_attn.q_proj (adapter [32, 32], model [48, 48])" in text
    assert "model.layers.0.mlp.down_proj (adapter [32, 64], model [48, 96])" in text


@pytest.mark.parametrize("with_card", [True, False])
def test_other_module_names(home, saved, tmp_path, with_card):
    adapter = home[2] if with_card else peft_adapter(home[2], tmp_path)
    text = refusal(adapter, *saved(model=gpt2()))
    assert "linear layers that the model lacks: model.layers.0.mlp.down_proj" in text and "more" in text


def test_another_tokenizer(home):
    model, print_, adapter = home
    text = refusal(adapter, model, dataclasses.replace(print_, tokenizer="f" * 64))
    assert "tokenizer" in text and "weights" not in text


def test_other_settings_of_the_same_shape(home, saved):
    assert "architecture" in refusal(home[2], *saved(rms_norm_eps=1e-4))


def test_every_difference_is_in_one_message(home, saved):
    model, print_ = saved(seed=3, layers=1, hidden=48)
    text = refusal(home[2], model, dataclasses.replace(print_, tokenizer="f" * 64))
    for words in ("weights:", "architecture:", "tokenizer:", "model lacks", "another shape", "Load the base"):
        assert words in text, words


# What cannot be known is said once and is no error.


def test_another_template_is_a_note(home):
    model, print_, adapter = home
    notes = check_base(adapter, model, dataclasses.replace(print_, template="f" * 64))
    assert len(notes) == 1 and "template" in notes[0]


def test_an_adapter_without_a_card_is_noted_once(home, tmp_path):
    notes = check_base(peft_adapter(home[2], tmp_path), *home[:2])
    assert notes == ["base unverified: the adapter does not record which base it was trained on"]


def test_a_model_from_memory_is_noted_once(home):
    model, print_, adapter = home
    notes = check_base(adapter, model, dataclasses.replace(print_, weights=UNKNOWN, tokenizer=UNKNOWN))
    assert notes == ["base unverified: weights unknown for the model, tokenizer unknown for the model"]


def test_an_unknown_part_does_not_hide_another_that_differs(home):
    model, print_, adapter = home
    other = dataclasses.replace(print_, weights=UNKNOWN, architecture="f" * 64)
    assert re.search("architecture: adapter [0-9a-f]{12}, model f{12} ", refusal(adapter, model, other))


def test_an_adapter_of_gpt2_fits_gpt2(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model, print_ = saved(model=gpt2())
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    peft.get_peft_model(gpt2(), config).save_pretrained(tmp_path / "gpt2")
    adapter = Adapter.load(tmp_path / "gpt2")
    assert len(check_base(adapter, model, print_)) == 1
    assert "another shape" in refusal(
        adapter, *saved(model=GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4)))
    )
