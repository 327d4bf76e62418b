"""The value: what its identity sees, what a save keeps, what a load notices."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.adapter import files
from veneer.adapter.card import CARD, Adapter, Card
from veneer.errors import AdapterError
from veneer.model.fingerprint import Fingerprint

BASE = Fingerprint("1" * 64, "2" * 64, "3" * 64, "4" * 64)
FILES = ["adapter_config.json", "adapter_model.safetensors", CARD]


def made(ranks: dict[str, int], seed: int = 0, **card) -> Adapter:
    """A random adapter of (R, 5) and (7, R) factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{m}.a": torch.randn(r, 5, generator=generator) for m, r in ranks.items()}
    tensors |= {f"{m}.b": torch.randn(7, r, generator=generator) for m, r in ranks.items()}
    about = {"method": "lora", "settings": {"r": 4}, "scales": dict.fromkeys(ranks, 2.0), "ranks": ranks, "base": BASE}
    return Adapter(tensors, Card(**(about | card)))


def changed(adapter: Adapter, **card) -> Adapter:
    return Adapter(adapter.tensors, dataclasses.replace(adapter.card, **card))


MODULES = ["m", "layers.1.q", "layers.11.q", "layers.2.q", "a-b.c_d", "0"]
modules = st.lists(st.sampled_from(MODULES), min_size=1, unique=True)
texts = st.text(max_size=12)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
cards = st.fixed_dictionaries(
    {
        "settings": st.dictionaries(texts, plain, max_size=4),
        "base": st.sampled_from([None, BASE, Fingerprint(), Fingerprint(weights="5" * 64)]),
        "base_name": st.none() | texts,
        "storage": st.none() | texts,
        "template_text": st.none() | texts,
        "training": st.dictionaries(texts, plain, max_size=4),
        "parents": st.lists(texts, max_size=3),
        "created": texts,
    }
)
in_a_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@in_a_folder
@given(modules, st.data(), cards)
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, names, data, about):
    ranks = {name: data.draw(st.integers(1, 4)) for name in names}
    adapter = made(ranks, data.draw(st.integers(0, 9)), **about)
    folder = tmp_path_factory.mktemp("saved")
    adapter.save(folder / "one")
    again = Adapter.load(folder / "one")
    assert again.identity == adapter.identity and again.card == adapter.card
    assert list(again.tensors) == list(adapter.tensors)
    assert all(torch.equal(again.tensors[name], adapter.tensors[name]) for name in adapter.tensors)
    again.save(folder / "two")
    for name in FILES:
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert sorted(os.listdir(folder / "one")) == FILES


@given(st.data())
def test_any_bit_changes_the_identity(data):
    adapter = made({"m": 2, "n": 1})
    name = data.draw(st.sampled_from(sorted(adapter.tensors)))
    tensors = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    bits = tensors[name].view(torch.int32).reshape(-1)
    bits[data.draw(st.integers(0, len(bits) - 1))] ^= 1 << data.draw(st.integers(0, 22))  # the exponent could give inf
    assert Adapter(tensors, adapter.card).identity != adapter.identity


def test_minus_zero_another_name_and_another_shape_change_the_identity():
    one = Adapter({"m.a": torch.zeros(1, 4), "m.b": torch.zeros(6, 1)}, made({"m": 1}).card)
    assert Adapter({"m.a": -torch.zeros(1, 4), "m.b": torch.zeros(6, 1)}, one.card).identity != one.identity
    same_bytes = Adapter({"m.a": torch.zeros(2, 2), "m.b": torch.zeros(3, 2)}, made({"m": 2}).card)
    assert same_bytes.identity != one.identity
    assert Adapter({"n.a": torch.zeros(1, 4), "n.b": torch.zeros(6, 1)}, made({"n": 1}).card).identity != one.identity


@pytest.mark.parametrize("part", ["weights", "architecture", "tokenizer"])
def test_another_base_changes_the_identity(part):
    adapter = made({"m": 2})
    other = dataclasses.replace(BASE, **{part: "f" * 64})
    assert changed(adapter, base=other).identity != adapter.identity


def test_the_method_and_its_vectors_change_the_identity():
    adapter = made({"m": 2})
    seen = {adapter.identity}
    for method, kind in (("dora", "m"), ("biased", "c"), ("rebiased", "o")):
        vector = torch.ones(len(adapter.tensors["m.b"]))
        card = dataclasses.replace(adapter.card, method=method)
        seen |= {Adapter({**adapter.tensors, f"m.{kind}": v}, card).identity for v in (vector, 2 * vector)}
    assert len(seen) == 7
    with pytest.raises(AdapterError, match=r"card\.method: got 'grandiose', wanted one of lora, dora"):
        changed(adapter, method="grandiose")


@pytest.mark.parametrize("card", [{"settings": {"r": 4, "group_size": 2}}, {"base": None}])
def test_what_changes_the_forward_changes_the_identity(card):
    adapter = made({"m": 2})
    assert changed(adapter, **card).identity != adapter.identity


@pytest.mark.parametrize(
    "card",
    [
        {"training": {"seconds": 3.5}},
        {"parents": ("a", "b")},
        {"base_name": "elsewhere"},
        {"storage": "nf4"},
        {"created": "2026-01-01"},
        {"veneer_version": "9"},
        {"template_text": "{{ x }}"},
        {"base": dataclasses.replace(BASE, template="f" * 64)},
        {"scales": {"m": 8.0}},
        {"settings": {"r": 8, "lora_alpha": 3.0, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["q"]}},
    ],
)
def test_what_does_not_change_the_forward_does_not_change_the_identity(card):
    adapter = made({"m": 2})
    assert changed(adapter, **card).identity == adapter.identity


def test_an_unrecorded_base_and_an_unknown_one_are_the_same():
    adapter = made({"m": 2})
    assert changed(adapter, base=None).identity == changed(adapter, base=Fingerprint()).identity


def test_identity_does_not_depend_on_the_order_or_layout_of_the_tensors():
    adapter = made({"m": 2, "n": 3})
    turned = {name: tensor.T.contiguous().T for name, tensor in reversed(adapter.tensors.items())}
    assert Adapter(turned, adapter.card).identity == adapter.identity


def test_a_value_does_not_change_with_what_it_was_made_from():
    a_RI, b_OR, training = torch.ones(2, 3), torch.ones(4, 2), {"losses": [1.0]}
    adapter = Adapter({"m.a": a_RI, "m.b": b_OR}, Card("lora", {}, {"m": 1.0}, {"m": 2}, training=training))
    before = adapter.identity
    a_RI.add_(1)
    training["losses"].append(2.0)
    assert adapter.identity == before and adapter.card.training == {"losses": [1.0]}


def test_factors_and_the_order_of_modules():
    ranks = {"layers.10.q": 1, "layers.2.q": 2, "head": 3, "layers.2.k": 1}
    adapter = made(ranks)
    assert adapter.modules() == ["head", "layers.2.k", "layers.2.q", "layers.10.q"]
    a_RI, b_OR = adapter.factors("layers.2.q")
    assert a_RI.shape == (2, 5) and b_OR.shape == (7, 2) and a_RI.is_contiguous() and not a_RI.requires_grad
    with pytest.raises(KeyError):
        adapter.factors("layers.3.q")


def test_narrow_floats_are_widened_and_gradients_dropped():
    half = {"m.a": torch.ones(1, 2, dtype=torch.bfloat16), "m.b": torch.nn.Parameter(torch.ones(2, 1))}
    adapter = Adapter(half, Card("lora", {}, {"m": 1.0}, {"m": 1}))
    assert {t.dtype for t in adapter.tensors.values()} == {torch.float32}
    assert not any(t.requires_grad for t in adapter.tensors.values())


def test_every_fault_of_a_value_is_in_one_message():
    tensors = {
        "nan.a": torch.full((1, 2), float("nan")),
        "nan.b": torch.ones(2, 1),
        "alone.a": torch.ones(1, 2),
        "chain.a": torch.ones(1, 2),
        "chain.b": torch.ones(2, 3),
        "whole.a": torch.ones(1, 2, dtype=torch.int64),
        "whole.b": torch.ones(2, 1),
        "odd": torch.ones(1),
    }
    with pytest.raises(AdapterError) as caught:
        Adapter(tensors, Card("lora", {}, {"nan": 0.0, "ghost": 1.0}, {"nan": 2}))
    text = str(caught.value)
    about_tensors = [
        "NaN",
        "not all of a, b: alone",
        "chain (a [1, 2], b [2, 3])",
        "not floating point: whole.a",
        "'odd'",
    ]
    about_card = ["nan (card 2, tensors 1)", "lacks: alone", "without tensors: ghost", "nan (0.0)"]
    for words in about_tensors + about_card:
        assert words in text, words
    with pytest.raises(AdapterError, match="no tensors"):
        Adapter({}, Card("lora", {}, {}, {}))


def test_settings_must_be_json_but_a_record_of_training_can_always_be_saved(tmp_path):
    with pytest.raises(AdapterError, match=r"card\.settings"):
        made({"m": 1}, settings={"x": float("nan")})
    record = {
        "loss": float("nan"),
        "ppl": float("inf"),
        "file": Path("a"),
        "n": np.int64(3),
        "x": np.float32(0.5),
        1: (2,),
    }
    adapter = made({"m": 1}, training=record)
    assert Adapter.load(adapter.save(tmp_path / "a")).card.training == {
        "loss": "nan", "ppl": "inf", "file": "a", "n": 3, "x": 0.5, "1": [2]
    }  # fmt: skip


# On disk.


@pytest.fixture
def folder(tmp_path) -> Path:
    return made({"m": 2, "layers.1.q": 3}).save(tmp_path / "new" / "adapter")


def message(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES[:2])
def test_one_flipped_bit_on_disk_is_noticed(folder, name):
    raw = bytearray((folder / name).read_bytes())
    at = len(raw) - 2 if name.endswith("safetensors") else raw.index(b'"lora_alpha": 2') + len('"lora_alpha": ')
    raw[at] ^= 1
    (folder / name).write_bytes(raw)
    assert "changed or damaged" in message(folder)


def test_without_its_card_a_folder_loads_as_unverified(folder):
    (folder / CARD).unlink()
    adapter = Adapter.load(folder)
    assert adapter.card.base is None and adapter.card.ranks == {"m": 2, "layers.1.q": 3}
    assert set(adapter.card.scales.values()) == {1.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2, "veneer_version": "7.1"}, ["got format 2, wanted 1", "veneer 7.1"]),
        ({"format": None}, ["got format None"]),
        ({"method": None}, ["method: got None, wanted str"]),
        ({"ranks": {"m": 2, "layers.1.q": "3"}}, ["ranks"]),
        ({"ranks": {"m": 1, "layers.1.q": 3}}, ["m (card 1, tensors 2)"]),
        ({"scales": {"m": 1.0}}, ["card.scales lacks: layers.1.q"]),
        ({"scales": [1]}, ["scales: got [1]"]),
        ({"parents": [1]}, ["parents: got [1]"]),
        ({"base": {"weights": "x"}}, ["weights", "'x'", "template: missing"]),
        ({"base": 3}, ["base: got 3"]),
        ({"colour": "red"}, ["'colour': not a known key"]),
        ({"identity": None}, ["written for identity None"]),
        ({"identity": "0" * 64}, ["written for identity '000"]),
    ],
)
def test_a_card_that_is_not_understood_is_refused(folder, changes, words):
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | changes))
    text = message(folder)
    assert all(word in text for word in words), text


def test_faults_of_card_config_and_tensors_come_together(folder):
    (folder / CARD).write_text("{")
    (folder / FILES[0]).write_text("[]")
    (folder / FILES[1]).write_bytes(b"")
    text = message(folder)
    assert all(name in text for name in FILES)


def test_other_files_in_the_folder_stay(folder):
    (folder / "run.yaml").write_text("r: 4")
    other = made({"m": 2}, seed=7)
    other.save(folder)
    assert Adapter.load(folder).identity == other.identity
    assert (folder / "run.yaml").read_text() == "r: 4" and len(os.listdir(folder)) == 4


def test_a_save_cut_short_in_a_new_folder_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(AdapterError, match="disk full"):
        made({"m": 2}).save(tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_save_cut_short_in_an_old_folder_is_the_old_adapter_or_is_noticed(folder, monkeypatch, done):
    before, calls, replace = Adapter.load(folder).identity, [], os.replace

    def failing(source, target):
        if len(calls) == done:
            raise OSError("power cut")
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(AdapterError, match="power cut"):
        made({"m": 2, "layers.1.q": 3}, seed=9).save(folder)
    assert sorted(os.listdir(folder)) == FILES
    if done == 0:
        assert Adapter.load(folder).identity == before
    else:
        assert "changed or damaged" in message(folder)


def test_a_file_is_not_overwritten_by_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="a file"):
        made({"m": 1}).save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
