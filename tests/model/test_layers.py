"""Decoder layers compiled and computed twice: the same losses and gradients as the plain ones."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.bases.nf4 import NF4
from veneer.methods.anchored import AnchoredLoRA
from veneer.methods.dora import DoRA
from veneer.methods.lora import LoRA
from veneer.model import layers, tiled
from veneer.model.layers import arrange, as_they_were, decoder_layers
from veneer.model.leaf import Leaf
from veneer.model.load import prepare
from veneer.model.losses import cross_entropy, targets_of
from veneer.model.packed import running, whole, wiring_of
from veneer.model.stream import Span, Stream, pack
from veneer.model.swap import leaf_at, linear_paths

LENGTHS = (33, 20, 11)
# Of a gradient's largest entry: float32 sums in another order, through three layers.
CLOSE = 1e-4


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 90}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=True)).eval()
    for parameter in made.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    prepare(made)
    for path in linear_paths(made):
        leaf = leaf_at(made, path)
        if not path.endswith("k_proj"):  # a family that is not whole
            leaf.slots["one"] = LoRA(torch.randn(4, leaf.in_features) / 8, torch.randn(leaf.out_features, 4) / 8, 0.5)
    wiring_of(made).slots.append("one")
    return made


def stream_of(lengths=LENGTHS, slot: str | None = "one") -> Stream:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(90, (length,), generator=generator).tolist() for length in lengths]
    return pack(rows, [slot] * len(rows), multiple=32)


def losses(model, lengths=LENGTHS):
    for parameter in model.parameters():
        parameter.grad = None
    stream = stream_of(lengths)
    with running(model, stream):
        sums_N, _ = cross_entropy(model, stream, targets_of(stream, [[True] * length for length in lengths]))
        sums_N.sum().backward()
    return sums_N.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(found, wanted, each=2):
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys() and len(wanted[1]) == each * 6 * 3
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).abs().max() <= CLOSE * gradient.abs().max(), name


@pytest.mark.parametrize("count", [0, 1, 2, -1])
def test_layers_computed_twice_give_the_same(model, count):
    wanted = losses(model)
    arrange(model, recompute=count)
    found = losses(model)
    assert torch.equal(found[0], wanted[0]) and all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])


def products(model, monkeypatch) -> list[str]:
    """Paths of the leaves whose bases are multiplied while `losses` runs, forward and again."""
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Leaf):
            times = module.base.matmul
            monkeypatch.setattr(
                module.base, "matmul", lambda *given, name=name, times=times: (seen.append(name), times(*given))[1]
            )
    losses(model)
    return seen


def after_mlp(layer, change):
    own = type(layer.mlp).forward
    layer.mlp.forward = lambda x: change(own(layer.mlp, x))


def test_the_last_product_of_a_layer_is_computed_once(model, monkeypatch):
    arrange(model, recompute=-1)
    losses(model)  # finds out
    counts = Counter(name.rpartition(".")[2] for name in products(model, monkeypatch))
    assert counts == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 6) | {
        "down_proj": 3
    }


def test_a_last_product_that_a_gradient_reads_is_computed_again(model, monkeypatch):
    # As in families that scale what a layer adds: the gradient of the scale is the product itself.
    for layer in decoder_layers(model):
        layer.mlp.scale = torch.nn.Parameter(torch.full((32,), 0.5))
        after_mlp(layer, lambda y, scale=layer.mlp.scale: y * scale)
    wanted = losses(model)
    arrange(model, recompute=-1)
    found = losses(model)
    assert all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])
    assert any("scale" in name for name in wanted[1])
    assert Counter(name.rpartition(".")[2] for name in products(model, monkeypatch))["down_proj"] == 6


@pytest.mark.parametrize("last", [False, True])
def test_a_function_that_swallows_nan_does_not_hide_what_it_reads(last):
    """ReLU's gradient asks whether its input is above zero: NaN is not, so the gradient stays finite, and is wrong."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 90}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, hidden_act="relu")).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    prepare(model)
    for path in linear_paths(model):
        if path.endswith("dense_h_to_4h") or (last and path.endswith("dense_4h_to_h")):
            leaf = leaf_at(model, path)
            leaf.slots["one"] = LoRA(torch.randn(4, leaf.in_features) / 8, torch.randn(leaf.out_features, 4) / 8, 0.5)
    wiring_of(model).slots.append("one")
    wanted = losses(model)
    arrange(model, recompute=-1)
    found = losses(model)
    assert found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])


@pytest.mark.parametrize("function", [torch.relu, lambda y: y.clamp(-1, 1), torch.abs])
@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0])  # a ReLU that is open, or shut, for every token
def test_functions_that_decide_by_comparing_read_the_product(model, function, offset):
    for layer in decoder_layers(model):
        after_mlp(layer, lambda y: function(y + offset))
    wanted = losses(model)
    arrange(model, recompute=-1)
    found = losses(model)
    assert all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])


def test_layers_that_differ_in_what_is_trained_answer_for_themselves(model):
    for number, layer in enumerate(decoder_layers(model)):
        layer.mlp.scale = torch.nn.Parameter(torch.full((32,), 0.5), requires_grad=number > 0)
        after_mlp(layer, lambda y, scale=layer.mlp.scale: y * scale)
    wanted = losses(model)
    arrange(model, recompute=-1)
    found = losses(model)
    assert all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])


def test_a_users_hook_sees_what_is_computed(model):
    seen = []
    decoder_layers(model)[1].mlp.down_proj.register_forward_hook(lambda *given: seen.append(given[2].isfinite().all()))
    arrange(model, recompute=-1)
    losses(model)
    losses(model)
    assert len(seen) == 4 and all(seen)


def test_where_the_last_layer_has_no_adapter_nothing_is_left_out(model, monkeypatch):
    for layer in decoder_layers(model):
        del layer.mlp.down_proj.slots["one"]
    wanted = losses(model)
    arrange(model, recompute=-1)
    found = losses(model)
    assert found[1].keys() == wanted[1].keys() and all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 24)


@pytest.mark.parametrize("lengths", [LENGTHS, (80,), (20,)])  # 64 and 96 tokens in pieces of 24; 32 in two
@pytest.mark.parametrize("compiled", [False, True])
def test_an_mlp_in_pieces_gives_the_same(model, small_tiles, lengths, compiled):
    wanted = losses(model, lengths)
    arrange(model, compiled=compiled, recompute=2, backend="aot_eager")
    for _ in range(2):  # the first finds out which product need not be computed again
        same(losses(model, lengths), wanted)
    as_they_were(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_mlp_with_a_forward_of_someone_elses_keeps_it(model, small_tiles):
    for layer in decoder_layers(model):
        after_mlp(layer, lambda y: 0.5 * y)
    wanted = losses(model)
    arrange(model, recompute=-1)
    same(losses(model), wanted)
    as_they_were(model)
    same(losses(model), wanted)


@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0])
def test_a_layer_that_bends_what_its_pieces_give_reads_it(model, small_tiles, monkeypatch, offset):
    """The layer, not the MLP: a ReLU on what the MLP gives, open or shut for every token."""
    own = type(decoder_layers(model)[0]).forward

    class Bent(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return torch.relu(self.mlp(x) + offset)

    def forward(layer, *args, **kwargs):
        mlp = layer._modules["mlp"]
        layer._modules["mlp"] = Bent(mlp)
        try:
            return own(layer, *args, **kwargs)
        finally:
            layer._modules["mlp"] = mlp

    monkeypatch.setattr(type(decoder_layers(model)[0]), "forward", forward)
    wanted = losses(model)
    arrange(model, recompute=-1)
    same(losses(model), wanted)


def test_an_mlp_in_pieces_is_computed_as_often_as_without(model, small_tiles, monkeypatch):
    rows: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, Leaf) and "layers.0" in name:
            times = module.base.matmul

            def counted(x, *rest, name=name, times=times):
                assert len(x) <= tiled.TILE or "mlp" not in name
                rows[name.rpartition(".")[2]] += len(x)
                return times(x, *rest)

            monkeypatch.setattr(module.base, "matmul", counted)
    arrange(model, recompute=-1)
    losses(model)
    rows.clear()
    losses(model)
    tokens = len(stream_of().token_ids_T)
    assert rows == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 2 * tokens) | {
        "down_proj": tokens
    }


def test_pieces_of_several_slots_and_of_one_over_a_part(model, small_tiles):
    for path in linear_paths(model):
        leaf = leaf_at(model, path)
        leaf.slots["two"] = LoRA(torch.randn(3, leaf.in_features) / 8, torch.randn(leaf.out_features, 3) / 8, 1.0)
    wiring_of(model).slots.append("two")

    def both():
        for parameter in model.parameters():
            parameter.grad = None
        generator = torch.Generator().manual_seed(1)
        rows = [torch.randint(90, (length,), generator=generator).tolist() for length in (30, 33, 20)]
        stream = pack(rows, ["one", None, "two"], multiple=32)
        with running(model, stream):
            sums_N, _ = cross_entropy(model, stream, targets_of(stream, [[True] * len(row) for row in rows]))
            sums_N.sum().backward()
        return sums_N.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    wanted = both()
    arrange(model, recompute=-1)
    found = both()
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).abs().max() <= CLOSE * gradient.abs().max(), name


@pytest.mark.parametrize("decoded, times", [(False, 3), (True, 2)])
def test_a_weight_is_decoded_once_for_the_second_run_and_its_backward(model, monkeypatch, decoded, times):
    for path in linear_paths(model):
        leaf = leaf_at(model, path)
        leaf.base = NF4.from_weight(leaf.base.weight.detach(), leaf.base.bias)
    wanted, counts = losses(model), Counter()
    own = NF4.decode
    monkeypatch.setattr(NF4, "decode", lambda base, dtype=None: (counts.update([id(base)]), own(base, dtype))[1])
    arrange(model, recompute=-1, decoded=decoded)
    losses(model)
    counts.clear()
    found = losses(model)
    assert torch.equal(found[0], wanted[0]) and all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])
    mlp = decoder_layers(model)[1].mlp
    assert counts[id(mlp.gate_proj.base)] == times
    assert counts[id(mlp.down_proj.base)] == 2  # its second product is left out
    assert not any(base.held is not None or base.holding for base in model.modules() if isinstance(base, NF4))


class Held:
    """A tensor that a graph keeps for backward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept(model) -> int:
    """Elements of activations that are kept between forward and backward."""
    alive: list[weakref.ref[Held]] = []

    def keep(tensor: torch.Tensor) -> Held:
        held = Held(tensor)
        alive.append(weakref.ref(held))
        return held

    stream = stream_of()
    with running(model, stream), torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        sums_N, _ = cross_entropy(model, stream, targets_of(stream, [[True] * length for length in LENGTHS]))
    tensors = [held.tensor for ref in alive if (held := ref()) is not None]
    assert sums_N.requires_grad
    return sum(tensor.numel() for tensor in tensors if not isinstance(tensor, torch.nn.Parameter))


def test_layers_computed_twice_keep_their_input_alone(model):
    tokens, hidden = len(stream_of().token_ids_T), model.config.hidden_size
    counts = []
    for count in range(4):
        arrange(model, recompute=count)
        counts.append(kept(model))
    spared = [before - after for before, after in pairwise(counts)]
    assert min(spared) > 10 * tokens * hidden  # activations of a layer, less its input
    head = counts[-1] - 3 * tokens * hidden
    assert head < 10 * tokens * hidden


@pytest.mark.parametrize("count", [0, 2])
def test_compiled_layers_give_the_same(model, count):
    wanted = losses(model), losses(model, (40, 24))
    arrange(model, compiled=True, recompute=count, backend="aot_eager")
    same(losses(model), wanted[0])
    same(losses(model, (40, 24)), wanted[1])


@pytest.mark.parametrize(
    "kind, storage, fused",
    [(DoRA, "dense", False), (DoRA, "nf4", True), (AnchoredLoRA, "nf4", False), (AnchoredLoRA, "dense", True)],
)
def test_other_methods_in_compiled_layers(model, kind, storage, fused, monkeypatch):
    """Computed twice in part, gated MLPs as one operation or not."""
    torch._dynamo.reset()
    monkeypatch.setattr(layers, "is_fused", lambda device: fused)
    for leaf in [module for module in model.modules() if isinstance(module, Leaf) and "one" in module.slots]:
        if storage == "nf4":
            leaf.base = NF4.from_linear(leaf.base)
        given = [leaf.slots["one"].a_RI.data, leaf.slots["one"].b_OR.data]
        leaf.slots["one"] = kind(*given, *([leaf.base.row_norms()] if kind is DoRA else []), 0.5)
        for parameter in leaf.slots["one"].parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    wanted = losses(model)
    arrange(model, compiled=True, recompute=2, backend="aot_eager")
    same(losses(model), wanted, 3 if kind is DoRA else 2)


@pytest.mark.parametrize("recompute", [0, -1])
def test_all_layers_share_one_compilation(model, recompute):
    from torch._dynamo.testing import CompileCounterWithBackend

    def compiled(layers: int) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model.config.num_hidden_layers = layers  # as many as the model's own loop runs
        arrange(model, compiled=True, recompute=recompute, backend=counter)
        losses(model)
        losses(copy.deepcopy(model))
        return counter.frame_count

    assert 0 < compiled(1) == compiled(3)


def test_a_copied_model_computes_with_its_own_weights(model):
    arrange(model, compiled=True, backend="aot_eager")
    losses(model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data *= 1.1
    found = losses(other)
    as_they_were(other)
    same(found, losses(other))


def test_several_slots_and_ordinary_calls_are_not_compiled(model):
    def fails(*_unused):
        raise AssertionError("compiled")

    ids = torch.tensor([[1, 2, 3]])
    wanted = model(ids).logits
    arrange(model, compiled=True, backend=fails)
    assert torch.equal(model(ids).logits, wanted)
    stream = stream_of(slot=None)
    with running(model, stream), torch.no_grad():
        cross_entropy(model, stream, targets_of(stream, [[True] * length for length in LENGTHS]))


def test_layers_that_the_adapter_leaves_out_keep_no_decoded_weight(model):
    """The compiler would: it sees that forward and backward decode the same."""
    for path in linear_paths(model):
        leaf = model.get_submodule(path)
        leaf.base = NF4.from_weight(leaf.base.weight.detach(), leaf.base.bias)
        if path.endswith(("gate_proj", "up_proj", "down_proj")):
            del leaf.slots["one"]
    arrange(model, compiled=True, backend="aot_eager_decomp_partition")
    decoded = {leaf.base.out_features * leaf.base.in_features for leaf in model.modules() if isinstance(leaf, Leaf)}
    sizes = []
    stream = stream_of()
    with running(model, stream):
        sums_N, _ = cross_entropy(model, stream, targets_of(stream, [[True] * length for length in LENGTHS]))
        seen, ahead = set(), [sums_N.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            ahead += [function for function, _ in node.next_functions]
            sizes += [tuple(t.shape) for t in getattr(node, "saved_tensors", ()) if t is not None]
    widths = {32, 48, 16, 8}
    assert sizes and not [s for s in sizes if len(s) == 2 and s[0] * s[1] in decoded and set(s) <= widths]


def test_a_users_own_compilation_takes_the_eager_way(model):
    """With its dropout, its slots, its autocast."""
    ids = torch.tensor([[1, 2, 3, 4]])
    wiring_of(model).voice = "one"
    wanted = model(ids).logits
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(ids).logits, wanted)
    compiled = torch.compile(model, backend="aot_eager")
    for leaf in model.modules():
        if isinstance(leaf, Leaf) and "one" in leaf.slots:
            leaf.slots["one"].dropout = 0.5
    model.train()
    assert not torch.allclose(compiled(ids).logits, wanted, atol=1e-3)


def test_as_they_were(model):
    arrange(model, recompute=-1)
    as_they_were(model)
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


@pytest.mark.parametrize(
    "spans, keys, wanted",
    [
        ((Span(0, 5, "a"),), {}, "a"),
        ((), {}, None),
        ((Span(0, 5, "a"),), {"a": 1}, None),
        ((Span(0, 4, "a"),), {}, None),
        ((Span(0, 5, "a", 0.5),), {}, None),
        ((Span(0, 3, "a"), Span(3, 5, "b")), {}, None),
    ],
)
def test_who_speaks_over_a_whole_stream(spans, keys, wanted):
    assert whole(Stream(torch.zeros(5, dtype=torch.int64), torch.arange(5), (5,), spans, keys)) == wanted
