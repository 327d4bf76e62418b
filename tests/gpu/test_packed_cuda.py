"""The packed forward on a CUDA GPU: the varlen kernel, adapters on different segments, and their gradients.

The oracle is the same model in float32 on the CPU, each sequence alone through transformers' own attention.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.methods.lora import LoRA
from veneer.model.load import prepare
from veneer.model.losses import cross_entropy, targets_of
from veneer.model.packed import hidden_states, running, speaking, wiring_of
from veneer.model.probe import probe
from veneer.model.stream import pack
from veneer.model.swap import leaf_at, linear_paths

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]
LENGTHS = (1, 37, 700, 64, 129)
SLOTS = ("one", "one", "one", "two", "two")
BEGIN = 32  # tokens that all begin with, so that those of one slot may share them
shared = pytest.mark.parametrize("share", [False, True])


def _model() -> LlamaForCausalLM:
    """Two layers with grouped heads and two adapters in float32 on the CPU."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=1024)).eval()
    prepare(model)
    for path in linear_paths(model):
        leaf = leaf_at(model, path)
        for rank, name in ((4, "one"), (8, "two")):
            a_RI, b_OR = torch.randn(rank, leaf.in_features) / 16, torch.randn(leaf.out_features, rank) / 16
            leaf.slots[name] = LoRA(a_RI, b_OR, 1.0)
    wiring_of(model).slots += ["one", "two"]
    return model


def _sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    begin = torch.randint(320, (BEGIN,), generator=generator).tolist()
    rows = [torch.randint(320, (length,), generator=generator).tolist() for length in LENGTHS]
    return [(begin + row)[: len(row)] for row in rows]


@shared
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float32, 1e-3)])
def test_packed_logits_equal_each_sequence_alone(dtype, tolerance, share):
    reference = _model()
    model = copy.deepcopy(reference).to("cuda")
    model.to(dtype)
    stream = pack(_sequences(), SLOTS, "cuda", share=share, multiple=32)
    assert stream.branches is share
    with torch.no_grad(), running(model, stream):
        logits_TV = model.get_output_embeddings()(hidden_states(model)).float().cpu()
    for segment, sequence, slot in zip(stream.sequences, _sequences(), SLOTS, strict=True):
        with torch.no_grad(), speaking(reference, slot):
            wanted = reference(torch.tensor([sequence])).logits[0]
        error = (logits_TV[stream.rows_of(segment)] - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance  # bfloat16 rounds at 2^-8 in each of a dozen products; TF32 is off by default


@shared
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float32, 1e-3)])
def test_gradients_equal_the_cpu_in_float32(dtype, tolerance, share):
    reference = _model()
    model = copy.deepcopy(reference).to("cuda")
    for path in linear_paths(model):
        leaf = model.get_submodule(path)
        leaf.base.to(dtype)
    for module in (model.model.embed_tokens, model.model.norm, *model.model.layers):
        for parameter in module.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    model.lm_head.to(dtype)
    flags = [[True] * len(sequence) for sequence in _sequences()]
    gradients = []
    for each, device in ((reference, "cpu"), (model, "cuda")):
        stream = pack(_sequences(), SLOTS, device, share=share and device == "cuda")
        with running(each, stream):
            sums_N, counts_N = cross_entropy(each, stream, targets_of(stream, flags))
            (sums_N.sum() / counts_N.sum()).backward()
        gradients.append(torch.cat([p.grad.float().cpu().view(-1) for p in each.parameters() if p.grad is not None]))
    wanted, got = gradients
    assert torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted) < tolerance


def test_the_probe_passes_in_bfloat16():
    probe(_model().to("cuda", torch.bfloat16))
