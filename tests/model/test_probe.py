"""The probe passes what is right and names what is wrong. Families: test_packed.py."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from veneer.errors import ModelError
from veneer.model import attention, losses, segments
from veneer.model import probe as probing
from veneer.model.buckets import Buckets
from veneer.model.load import prepare
from veneer.model.packed import running, wiring_of
from veneer.model.probe import TOLERANCE, probe
from veneer.model.stream import pack


@pytest.fixture
def model(pico):
    """Weights of a trained model's size: with the fresh ones (0.02) attention is uniform and no fault could be seen."""
    for parameter in pico.parameters():
        if parameter.dim() > 1:
            parameter.data *= 15
    prepare(pico)
    return pico


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_model_passes_and_is_unchanged(model, dtype):
    model.to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    probe(model)
    assert wiring_of(model).fault is None and wiring_of(model).stream is None
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_in_training_mode_is_probed_without_its_own_dropout():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.5)).train()
    model.transformer.h[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    probe(model)
    assert [module.training for module in model.modules()] == modes


def test_a_model_that_amplifies_rounding_is_measured_by_its_own(model, monkeypatch):
    model.to(torch.bfloat16)
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 1e-9)  # as if rounding were always too much
    probe(model)
    with mock.patch.object(segments, "Buckets", NoMask), pytest.raises(ModelError, match="first of three packed"):
        probe(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(type(model), "_supports_sdpa", False)  # no second attention to measure by
    with pytest.raises(ModelError, match="of three packed"):
        probe(model)


TO_GRADIENTS = losses.cross_entropy_


class NoMask(Buckets):
    def _mask(self, sizes):
        return torch.zeros_like(super()._mask(sizes))


class OneSegment(Buckets):
    def __init__(self, stream, *rest):
        super().__init__(pack([[1] * sum(stream.lengths)]), *rest)


class NoChains(Buckets):
    def __init__(self, stream, *rest):
        super().__init__(dataclasses.replace(stream, parents=()), *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "broken, message",
    [
        (mock.patch.object(segments, "Buckets", NoMask), "first of three packed sequences.*second of three"),
        (mock.patch.object(segments, "Buckets", OneSegment), "third of three packed sequences"),
        (mock.patch.object(segments, "Buckets", NoChains), "first of three packed sequences.*second of three"),
        (
            mock.patch.object(losses, "cross_entropy_", lambda *args: TO_GRADIENTS(*args) * 1.3),
            "loss in chunks differs",
        ),
        (mock.patch.object(attention, "attend_segments", side_effect=KeyError("lost")), "packed forward failed.*lost"),
    ],
    ids=["mask", "borders", "chains", "head", "crash"],
)
def test_each_fault_is_found_and_named(model, dtype, broken, message):
    model.to(dtype)
    with broken, pytest.raises(ModelError, match=f"family 'llama' are not supported: .*{message}"):
        probe(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match="no packed path"), running(model, pack([[1]])):
        pass
    model(torch.tensor([[1, 2]]))


def test_wrong_positions_are_found(model):
    class Shifted:
        def __call__(self, *args, **kwargs):
            stream = pack(*args, **kwargs)
            stream.positions_T[-11:] += torch.arange(11) * 2
            return stream

    with (
        mock.patch.object(probing, "pack", Shifted()),
        pytest.raises(ModelError, match="third of three packed sequences"),
    ):
        probe(model)


def test_a_head_that_is_capped_or_scaled_is_found(model):
    class Capped(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.weight, self.bias = head.weight, head.bias

        def forward(self, x):
            return nn.functional.linear(x, self.weight).tanh() * 2

    model.set_output_embeddings(Capped(model.lm_head))
    with pytest.raises(ModelError, match="loss in chunks"):
        probe(model)


def test_nan_weights_are_found(model):
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"NaN or infinity, model\.layers\.1\.mlp\.up_proj"):
        probe(model)


def test_every_dtype_that_torch_models_come_in_has_a_tolerance():
    assert set(TOLERANCE) >= {torch.float32, torch.bfloat16, torch.float16}


def test_a_tiny_vocabulary_is_enough():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    probe(LlamaForCausalLM(config).eval())
