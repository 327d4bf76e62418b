"""A gated MLP as one operation: told by what it computes, the same gradients, nobody's hook passed by."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from veneer.bases.nf4 import NF4
from veneer.methods.base import Method
from veneer.methods.lora import LoRA
from veneer.model import gated, layers, tiled, traced
from veneer.model.gated import is_gated
from veneer.model.layers import arrange, as_they_were, decoder_layers
from veneer.model.load import prepare
from veneer.model.losses import cross_entropy, targets_of
from veneer.model.packed import running, wiring_of
from veneer.model.stream import pack
from veneer.model.swap import leaf_at, linear_paths

LENGTHS = (33, 20, 11)
# Of a gradient's largest entry: float32 sums in another order, through three layers.
CLOSE = 1e-4


def made(kind: str = "llama", **more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 90}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    prepare(model)
    for number, path in enumerate(linear_paths(model)):
        leaf, rank, scale = leaf_at(model, path), 2 + number % 3, 0.2 + 0.1 * (number % 7)
        a_RI, b_OR = torch.randn(rank, leaf.in_features) / 8, torch.randn(leaf.out_features, rank) / 8
        leaf.slots["one"] = LoRA(a_RI, b_OR, scale)
    wiring_of(model).slots.append("one")
    return model


@pytest.fixture
def model() -> LlamaForCausalLM:
    return made()


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """What other tests had compiled counts towards the compiler's limit for one function."""
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often the operation ran; it does on this machine too."""
    seen: Counter[str] = Counter()
    monkeypatch.setattr(layers, "is_fused", lambda device: True)
    own = traced.gate_and_up
    monkeypatch.setattr(traced, "gate_and_up", lambda *given: (seen.update(["forward"]), own(*given))[1])
    return seen


def losses(model, slots=("one",) * 3):
    for parameter in model.parameters():
        parameter.grad = None
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(90, (length,), generator=generator).tolist() for length in LENGTHS]
    stream = pack(rows, list(slots), multiple=32)
    with running(model, stream):
        sums_N, _ = cross_entropy(model, stream, targets_of(stream, [[True] * length for length in LENGTHS]))
        sums_N.sum().backward()
    return sums_N.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys() and wanted[1]
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).abs().max() <= CLOSE * gradient.abs().max(), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "olmo2"])
def test_the_form_is_recognised(kind):
    assert all(is_gated(layer.mlp) for layer in decoder_layers(made(kind)))


@pytest.mark.parametrize(
    "kind, more",
    [("gemma", {}), ("gemma2", {}), ("starcoder2", {}), ("llama", {"hidden_act": "gelu"}), ("phi3", {})],
)
def test_another_form_is_not(kind, more):
    more = {"pad_token_id": 0} | more
    assert not any(is_gated(layer.mlp) for layer in decoder_layers(made(kind, **more)))


def scaled(self, x):
    return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def scaled_in_place(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)).mul_(0.5)


def clamped_inside(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-10, 10))


def clamped_gate(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=1000)) * self.up_proj(x))


def gate_in_place(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x).mul_(2)) * self.up_proj(x))


def fed_another(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x + 0))


def remembered(self, x):
    self.seen = x
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def asked_twice(self, x):
    self.up_proj(x)
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    "forward",
    [scaled, scaled_in_place, clamped_inside, clamped_gate, gate_in_place, fed_another, remembered, asked_twice],
)
def test_a_class_that_does_a_little_more_is_another_form(model, forward):
    mlp = decoder_layers(model)[0].mlp
    mlp.__class__ = type("Other", (type(mlp),), {"forward": forward})
    assert not is_gated(mlp)


@pytest.mark.parametrize("recompute", [0, 2, -1])
@pytest.mark.parametrize("pieces", [False, True])
def test_losses_and_gradients_are_the_same(model, calls, monkeypatch, recompute, pieces):
    if pieces:
        monkeypatch.setattr(tiled, "TILE", 24)
    wanted = losses(model)
    arrange(model, compiled=True, recompute=recompute, backend="aot_eager")
    for _ in range(2):  # the first finds out which product need not be computed again
        calls.clear()
        same(losses(model), wanted)
    parts = 3 if pieces else 1  # 64 tokens in pieces of 24
    # forward, and where it is computed twice: in pieces, it runs again in backward alone
    assert calls["forward"] == sum(2 * parts if n < recompute % 4 else 1 for n in range(3))
    as_they_were(model)
    calls.clear()
    same(losses(model), wanted)
    assert not calls


def test_the_last_product_is_left_out_and_h_is_made_once(model, calls, monkeypatch):
    arrange(model, compiled=True, recompute=-1, backend="aot_eager")
    losses(model)
    seen: Counter[str] = Counter()
    down = traced.down
    monkeypatch.setattr(traced, "down", lambda *given: (seen.update(["down"]), down(*given))[1])
    losses(model)
    assert seen["down"] == 3 and calls["forward"]


def test_a_quantised_base_and_a_bias(calls):
    model = made("llama", mlp_bias=True)
    for path in linear_paths(model):
        leaf = leaf_at(model, path)
        bias = leaf.base.bias if path.endswith("down_proj") else None  # of gate and up it would have to be added
        leaf.base = NF4.from_weight(leaf.base.weight.detach(), bias)
    wanted = losses(model)
    arrange(model, compiled=True, recompute=1, decoded=True, backend="aot_eager")
    same(losses(model), wanted)
    assert calls["forward"]


def bias_of_gate(model):
    mlp = decoder_layers(model)[0].mlp
    mlp.gate_proj.base.bias = torch.nn.Parameter(torch.randn(48), requires_grad=False)


def bias_of_up(model):
    mlp = decoder_layers(model)[0].mlp
    mlp.up_proj.base.bias = torch.nn.Parameter(torch.randn(48), requires_grad=False)


def hook(model):
    decoder_layers(model)[0].mlp.act_fn.register_forward_hook(lambda module, given, out: None)


def backward_hook(model):
    mlp = decoder_layers(model)[0].mlp
    mlp.down_proj.register_full_backward_pre_hook(lambda module, gs: (2 * gs[0],))


def forward_of_a_leaf(model):
    leaf = decoder_layers(model)[0].mlp.gate_proj
    own = leaf.forward
    leaf.forward = lambda x: 2 * own(x)


def another_method(model):
    leaf = decoder_layers(model)[0].mlp.up_proj
    leaf.slots["one"] = AnyMethod(leaf.slots["one"])


def no_adapter(model):
    del decoder_layers(model)[0].mlp.down_proj.slots["one"]


def wide(model):
    leaf = decoder_layers(model)[0].mlp.up_proj
    rank = gated.MOST_RANK + 1
    leaf.slots["one"] = LoRA(torch.randn(rank, 32) / 8, torch.randn(48, rank) / 8, 0.5)


class AnyMethod(Method):
    """Not LoRA, though it adds the same."""

    def __init__(self, inner: LoRA) -> None:
        super().__init__()
        self.inner = inner

    def delta(self, x_TI, y_TO, base, gate_TR=None):
        return self.inner.delta(x_TI, y_TO, base)


CHANGES = [
    *(bias_of_gate, bias_of_up, hook, backward_hook, forward_of_a_leaf, no_adapter, another_method),
    wide,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_operation_does_not_do_is_the_models_own(model, calls, change):
    change(model)
    wanted = losses(model)
    arrange(model, compiled=True, backend="aot_eager")
    same(losses(model), wanted)
    assert calls["forward"] == 2  # the other layers'


def test_without_a_kernel_it_is_the_models_own(model, monkeypatch):
    monkeypatch.setattr(traced, "gate_and_up", None)
    monkeypatch.setattr(layers, "is_fused", lambda device: False)
    wanted = losses(model)
    arrange(model, compiled=True, backend="aot_eager")
    same(losses(model), wanted)


def test_several_slots_are_the_models_own(model, calls):
    wanted = losses(model, ("one", None, "one"))
    arrange(model, compiled=True, backend="aot_eager")
    same(losses(model, ("one", None, "one")), wanted)
    assert not calls
