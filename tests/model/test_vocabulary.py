"""Adapted embeddings and heads against the same model with its tables replaced: values, gradients, who speaks where.

The oracle is an unswapped copy, called for one sequence at a time by `functional_call` with W + Σ weight · ΔW in the
place of every adapted weight; ΔW is written down here. Legend: T tokens, N sequences, V vocabulary, D hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.families import config_of, gemma3, gpt2, model_of
from veneer.adapter.attach import attach, detach, methods_of
from veneer.config import LoraSettings
from veneer.errors import ModelError
from veneer.methods.dora import DoRA
from veneer.methods.rows import TokenRows
from veneer.model import losses
from veneer.model.dpo import dpo
from veneer.model.likelihood import sequence_likelihoods
from veneer.model.losses import cross_entropy, sequence_nll, targets_of
from veneer.model.packed import running, speaking
from veneer.model.stream import Span, pack
from veneer.model.vocabulary import EmbeddingLeaf, HeadLeaf, embedding_path, head_path, is_tied, multiplier_of

FAMILIES = {
    "llama": config_of("llama"),
    "tied": config_of("llama", tie_word_embeddings=True),
    "gemma2": config_of("gemma2", head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0),  # scaled, capped
    "gpt2": gpt2(),
    "gemma3": gemma3(),  # it also sees: the language model is a part of it
}
ENDS = {"gpt2": ("wte", "lm_head", "c_attn")}
IDS = [3, 7, 60]
KINDS = {
    "factors": lambda names: {"target_modules": list(names)},
    "head": lambda names: {"target_modules": list(names[1:])},
    "rows": lambda names: {"target_modules": [names[2]], "trainable_token_indices": IDS},
    "rows, head": lambda names: {"target_modules": list(names[1:]), "trainable_token_indices": IDS},
    "start": lambda names: {"target_modules": list(names), "init_lora_weights": "pissa"},
}
SEQUENCES = [[3, 5, 7, 9, 11, 60], [7, 7, 3, 20], [60, 1, 2, 3, 4, 5, 7]]


def made(family: str, **slots: str) -> tuple[Any, Any]:
    """The family's pico with random slots (name -> kind), and its unswapped copy."""
    torch.manual_seed(0)
    model = model_of(FAMILIES[family])
    bare = copy.deepcopy(model)
    names = ENDS.get(family, ("embed_tokens", "lm_head", "q_proj"))
    for number, (slot, kind) in enumerate(slots.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what tied weights mean; see tests/adapter/test_tokens.py
            attach(model, LoraSettings(r=3, lora_alpha=6, **KINDS[kind](names)), slot, seed=number)
        randomise(model, slot, number)
    return model, bare


def randomise(model: Any, slot: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for method in methods_of(model, slot).values():
        for parameter in method.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) / 5


def weights(model: Any, bare: Any, speaking_here: dict[str, float]) -> dict[str, Tensor]:
    """Name -> the weight that acts like base and slots (slot -> weight) together, differentiable in what they learn."""
    tied = is_tied(bare)
    held = {f"{path}.weight": bare.get_submodule(path).weight for path in (embedding_path(bare), head_path(bare))}
    for slot, weight in speaking_here.items():
        methods = dict(methods_of(model, slot))
        embedding, head = embedding_path(bare), head_path(bare)
        if tied and isinstance(methods.get(embedding), TokenRows):
            methods = {**methods, f"{head}/": methods[embedding]}  # beside what it has of its own
        for path, method in methods.items():
            module = bare.get_submodule(path.removesuffix("/"))
            name = f"{path.removesuffix('/')}.weight"
            if isinstance(method, TokenRows):
                delta = torch.zeros_like(module.weight).index_copy(
                    0, torch.tensor(IDS), method.rows_ND - module.weight[IDS].detach()
                )
            else:
                a_RI, b_OR = method.pair()
                delta = method.scale * b_OR @ a_RI
                delta = delta.t() if isinstance(module, (nn.Embedding, Conv1D)) else delta
            held.setdefault(name, module.weight.detach())
            held[name] = held[name] + weight * delta
    return held


def nll_of(model: Any, bare: Any, sequence: list[int], speaking_here: dict[str, float]) -> Tensor:
    """Σ of token cross-entropies of one sequence."""
    replaced = weights(model, bare, speaking_here)
    ids = torch.tensor([sequence])
    out = torch.func.functional_call(bare, replaced, (ids,), {"use_cache": False}, tie_weights=False)
    return F.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:], reduction="sum")


def trained(model: Any, *slots: str) -> list[nn.Parameter]:
    return [p for slot in slots for method in methods_of(model, slot).values() for p in method.parameters()]


def packed_sums(model: Any, slots: list[str | None], **changes: Any) -> tuple[Tensor, Tensor]:
    stream = dataclasses.replace(pack(SEQUENCES, slots), **changes)
    with running(model, stream):
        return cross_entropy(model, stream, targets_of(stream, [[True] * len(s) for s in SEQUENCES]))


def gradients(
    model: Any, stream: Any, weights_N: Tensor, parameters: list[nn.Parameter]
) -> tuple[Tensor, list[Tensor]]:
    with running(model, stream):
        sums_N, _ = cross_entropy(model, stream, targets_of(stream, [[True] * len(s) for s in SEQUENCES]))
        return sums_N.detach(), list(torch.autograd.grad((sums_N * weights_N).sum(), parameters))


def close(got: Tensor, wanted: Tensor, rtol: float = 1e-4) -> None:
    """float32 sums in another order, over two layers; relative to the largest."""
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * wanted.abs().max().item() + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_losses_and_gradients_are_those_of_the_tables_replaced(family, kind, monkeypatch):
    """Two slots and the base in one stream, the head in chunks of 4 rows."""
    monkeypatch.setattr(losses, "CHUNK", 4)
    model, bare = made(family, one=kind, two="factors")
    spoken: list[dict[str, float]] = [{"one": 1.0}, {}, {"two": 1.0}]
    parameters = trained(model, "one", "two")
    weights_N = torch.tensor([0.5, 2.0, -1.5])
    wanted_N = torch.stack([nll_of(model, bare, s, who) for s, who in zip(SEQUENCES, spoken, strict=True)])
    wanted = torch.autograd.grad((wanted_N * weights_N).sum(), parameters)
    stream = pack(SEQUENCES, ["one", None, "two"], multiple=32)
    got_N, got = gradients(model, stream, weights_N, parameters)
    close(got_N, wanted_N.detach())
    base_N = torch.stack([nll_of(model, bare, s, {}) for s in SEQUENCES])
    assert torch.allclose(got_N[1], base_N[1], rtol=1e-5) and (got_N - base_N)[[0, 2]].abs().min() > 1e-2
    for found, right in zip(got, wanted, strict=True):
        assert right.any()
        close(found, right, 1e-3)


@pytest.mark.parametrize("kinds", [("factors", "rows"), ("rows, head", "head")])
@pytest.mark.parametrize("family", FAMILIES)
def test_slots_overlap_with_weights(family, kinds):
    model, bare = made(family, one=kinds[0], two=kinds[1])
    first, second = len(SEQUENCES[0]), len(SEQUENCES[0]) + len(SEQUENCES[1])
    spans = (Span(0, second, "one", 0.25), Span(first, second, "two", 2.0), Span(0, first, "two", 0.0))
    got_N, _ = packed_sums(model, [None] * 3, spans=spans)
    spoken = [{"one": 0.25}, {"one": 0.25, "two": 2.0}, {}]
    close(
        got_N.detach(),
        torch.stack([nll_of(model, bare, *pair) for pair in zip(SEQUENCES, spoken, strict=True)]).detach(),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_calls_likelihoods_and_the_way_back(family):
    model, bare = made(family, one="rows, head", two="factors")
    ids = torch.tensor([SEQUENCES[2], SEQUENCES[2][::-1]])
    for slot in ("one", "two"):
        replaced = weights(model, bare, {slot: 1.0})
        wanted = torch.func.functional_call(bare, replaced, (ids,), tie_weights=False).logits.detach()
        with speaking(model, slot):
            close(model(ids).logits.detach(), wanted)
            close(model(ids, logits_to_keep=1).logits.detach(), wanted[:, -1:])
        examples = [type("Row", (), {"input_ids": row, "targets": [True] * len(row)}) for row in ids.tolist()]
        found = sequence_likelihoods(model, examples, slot)
        hits = (wanted[:, :-1].argmax(-1) == ids[:, 1:]).sum(1)
        nlls = F.cross_entropy(wanted[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
        assert [one.hits for one in found] == hits.tolist()
        assert [one.nll for one in found] == pytest.approx(nlls.tolist(), rel=1e-4)
        assert [nll for nll, _ in sequence_nll(model, examples, slot)] == pytest.approx(nlls.tolist(), rel=1e-4)
    keys, base = model.state_dict().keys(), bare(ids).logits
    assert keys == bare.state_dict().keys()
    with speaking(model, None):
        assert torch.equal(model(ids).logits, base)
    tied = is_tied(bare)
    detach(model)
    assert torch.equal(model(ids).logits, base) and is_tied(model) == tied
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]


def test_dora_on_the_head_alone():
    torch.manual_seed(0)
    model = model_of(FAMILIES["llama"])
    bare = copy.deepcopy(model)
    attach(model, LoraSettings(r=3, method="dora", target_modules=["lm_head"]), "one")
    randomise(model, "one")
    method = methods_of(model, "one")["lm_head"]
    assert isinstance(method, DoRA)
    moved_VD = bare.lm_head.weight + method.scale * method.b_OR @ method.a_RI
    bare.lm_head.weight.data = (method.m_O[:, None] * moved_VD / moved_VD.norm(dim=1, keepdim=True)).detach()
    got_N, _ = packed_sums(model, ["one"] * 3)
    close(got_N.detach(), torch.stack([nll_of(model, bare, s, {}) for s in SEQUENCES]).detach())


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_a_slots_nan_stays_its_own(family):
    model, _ = made(family, one="rows", two="factors")
    stream = pack(SEQUENCES, ["one", "two", None])
    parameters = trained(model, "one")
    weights_N = torch.ones(3)
    wanted_N, wanted = gradients(model, stream, weights_N, parameters)
    for parameter in trained(model, "two"):
        parameter.data.fill_(torch.nan)
    got_N, got = gradients(model, stream, weights_N, parameters)
    assert got_N[1].isnan() and torch.equal(got_N[[0, 2]], wanted_N[[0, 2]])
    assert all(map(torch.equal, got, wanted))


def test_dpo_holds_an_adapted_head_against_the_base():
    model, bare = made("tied", one="rows, head")
    pair = [SEQUENCES[0], SEQUENCES[1]]
    stream = pack(pair, ["one"] * 2)
    with running(model, stream):
        sums_N, counts_N = dpo(model, stream, targets_of(stream, [[True] * len(s) for s in pair]), beta=0.3)
    gains = [nll_of(model, bare, s, {}) - nll_of(model, bare, s, {"one": 1.0}) for s in pair]
    close(sums_N[0].detach(), -F.logsigmoid(0.3 * (gains[0] - gains[1])).detach())
    assert counts_N.tolist() == [1.0, 0.0]


def test_dropout_before_the_head_is_a_jobs_own(monkeypatch):
    """The same mask alone and beside others, whatever the chunks; another than none."""
    torch.manual_seed(0)
    model = model_of(FAMILIES["llama"])
    for slot in ("one", "two"):
        attach(model, LoraSettings(r=3, lora_dropout=0.5, target_modules=["embed_tokens", "lm_head"]), slot)
        randomise(model, slot)
    keys = {"one": 5, "two": 6}
    plain_N, _ = packed_sums(model, [None, "one", "two"])
    together_N, _ = packed_sums(model, [None, "one", "two"], dropout_keys=keys)
    alone_N, _ = packed_sums(model, [None, "one", None], dropout_keys=keys)
    monkeypatch.setattr(losses, "CHUNK", 3)
    chunked_N, _ = packed_sums(model, [None, "one", "two"], dropout_keys=keys)
    close(together_N[1], alone_N[1], 1e-6)
    close(chunked_N.detach(), together_N.detach(), 1e-6)
    assert (together_N - plain_N)[1:].abs().min() > 1e-3


def test_an_update_of_the_embedding_is_never_a_table(monkeypatch):
    """Of a vocabulary of 50,000 nothing of (V, D) is made, forward or backward, but the gradient of A (R, V)."""
    torch.manual_seed(0)
    model = model_of(config_of("llama", vocab_size=50_000, hidden_size=64, num_hidden_layers=1))
    attach(model, LoraSettings(r=2, target_modules=["embed_tokens"]), "one")
    largest: list[int] = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    leaf = model.model.embed_tokens
    assert isinstance(leaf, EmbeddingLeaf)
    with Watching():
        leaf(torch.tensor([[5, 49_999, 7]])).sum().backward()
    seen = [n for n in largest if n != leaf.weight.numel()]  # a view of the frozen weight is not made
    assert max(seen) == 2 * 50_000
    assert sum(n == leaf.weight.numel() for n in largest) == 0


def test_embeddings_that_do_more_are_refused():
    class Odd(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + 1

    for odd in (Odd(5, 3), nn.Embedding(5, 3, max_norm=1.0)):
        with pytest.raises(ModelError, match="does more than to look up rows"):
            multiplier_of(odd)
    torch.manual_seed(0)
    model = model_of(FAMILIES["llama"])
    model.model.embed_tokens = Odd(61, 32)
    with pytest.raises(ModelError, match=r"a Odd, which does more.*leave it out of --target-modules"):
        attach(model, LoraSettings(target_modules=["embed_tokens", "q_proj"]))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_second_slot_finds_the_leaves_of_the_first():
    model, _ = made("llama", one="factors")
    leaves = model.model.embed_tokens, model.lm_head
    attach(model, LoraSettings(r=2, target_modules=["embed_tokens", "lm_head"]), "two")
    attach(model, LoraSettings(r=2), "three")
    assert (model.model.embed_tokens, model.lm_head) == leaves
    assert list(map(type, leaves)) == [EmbeddingLeaf, HeadLeaf]
    assert not {"model.embed_tokens", "lm_head"} & set(methods_of(model, "three"))
