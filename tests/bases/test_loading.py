"""A checkpoint that is not this storage's is refused, all faults at once, and nothing is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from veneer.bases.fp8 import FP8
from veneer.bases.int4 import Int4
from veneer.bases.int8 import Int8, Int8Outlier
from veneer.bases.nf4 import NF4, NF4Double
from veneer.errors import ModelError

STATE = "weight.quant_state.bitsandbytes__nf4"
QUANTISED = [Int8, Int8Outlier, Int4, NF4, NF4Double, FP8]


def state_of(storage, **settings):
    """A checkpoint of a layer (6, 80), with other settings in its JSON."""
    state = storage.from_weight(torch.randn(6, 80)).state_dict()
    if settings:
        changed = json.loads(bytes(state[STATE].tolist())) | settings
        state[STATE] = torch.tensor(list(json.dumps(changed).encode()), dtype=torch.uint8)
    return state


def refused(storage, state, *words):
    base = storage.from_weight(torch.ones(6, 80))
    before = base.dense()
    with pytest.raises(ModelError) as caught:
        nn.ModuleDict({"q_proj": base}).load_state_dict({f"q_proj.{key}": value for key, value in state.items()})
    assert str(caught.value).startswith("q_proj: not a weight stored as")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert torch.equal(base.dense(), before)


@pytest.mark.parametrize("storage", QUANTISED)
def test_a_plain_weight(storage):
    refused(storage, {"weight": torch.zeros(6, 80, dtype=torch.bfloat16)}, "weight: got bfloat16 (6, 80), wanted")


@pytest.mark.parametrize("storage", [NF4, NF4Double])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_type": "fp4"}, "quant_type fp4, wanted nf4"),
        ({"blocksize": 128}, "blocksize 128, wanted 64"),
        ({"shape": [80, 6]}, "shape [80, 6], wanted [6, 80]"),
    ],
)
def test_other_settings(storage, settings, words):
    refused(storage, state_of(storage, **settings), words)


def test_all_faults_are_named_at_once():
    state = state_of(NF4, quant_type="fp4", blocksize=128) | {"weight.absmax": torch.zeros(3)}
    refused(NF4, state, "quant_type fp4", "blocksize 128", "weight.absmax: got float32 (3,), wanted float32 (8,)")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nested_blocksize": 128}, "nested_blocksize 128, wanted 256"),
        ({"nested_dtype": "float16"}, "nested_dtype float16, wanted float32"),
        ({"nested_offset": "much"}, "nested_offset much, wanted a finite number"),
        ({"nested_offset": float("nan")}, "nested_offset nan, wanted a finite number"),
    ],
)
def test_other_nested_settings(settings, words):
    refused(NF4Double, state_of(NF4Double, **settings), words)


def test_single_and_double_quantisation_are_two_storages():
    refused(NF4, state_of(NF4Double), "double quantisation, which is the storage nf4-dq")
    refused(NF4Double, state_of(NF4), "no double quantisation, which is the storage nf4")


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff\xff", b"null"])
def test_broken_settings(text):
    refused(NF4, state_of(NF4) | {STATE: torch.tensor(list(text), dtype=torch.uint8)}, f"{STATE}: not a JSON object")


def test_fp4_by_its_key():
    state = state_of(NF4)
    state["weight.quant_state.bitsandbytes__fp4"] = state.pop(STATE)
    refused(NF4, state, f"{STATE}: got weight.quant_state.bitsandbytes__fp4")


def test_other_levels():
    refused(NF4, state_of(NF4) | {"weight.quant_map": torch.linspace(-1, 1, 16)}, "weight.quant_map: not the 16 levels")


@pytest.mark.parametrize("storage", [Int8, Int8Outlier])
def test_another_layout_of_int8(storage):
    refused(storage, state_of(storage) | {"weight_format": torch.tensor(1, dtype=torch.uint8)}, "weight_format: got 1")


@pytest.mark.parametrize("storage", QUANTISED)
def test_what_is_missing_or_too_much_is_said_as_torch_says_it(storage):
    base, state = storage.from_weight(torch.randn(6, 80)), state_of(storage)
    scale = base.keys[next(iter(base.keys))]
    state.pop(scale)
    state["weight.other"] = torch.zeros(1)
    lost, extra = base.load_state_dict(state, strict=False)
    assert lost == [scale] and extra == ["weight.other"]
    with pytest.raises(RuntimeError, match=scale.replace(".", r"\.")):
        base.load_state_dict(state)


@pytest.mark.parametrize("storage", QUANTISED)
def test_values_that_are_not_finite(storage):
    state = state_of(storage)
    key = {NF4Double: "weight.nested_absmax", FP8: "weight.scale"}.get(
        storage, storage.keys["absmax"] if storage is not FP8 else ""
    )
    state[key] = torch.full_like(state[key], float("nan"))
    refused(storage, state, f"{key}: holds NaN or infinity")


@pytest.mark.parametrize("storage", QUANTISED)
def test_a_cast_bias_is_loaded(storage):
    base = storage.empty(6, 80, True, torch.bfloat16)
    base.load_state_dict(state_of(storage) | {"bias": torch.arange(6.0)})
    assert torch.equal(base.bias, torch.arange(6).bfloat16())
