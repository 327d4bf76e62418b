"""Training passes on a CUDA GPU: compiled, recorded as graphs, recomputed, offloaded; each computes what eager does.

Eager on the GPU is itself checked against float32 on the CPU in test_packed_cuda.py.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings
from veneer.methods.anchored import AnchoredLoRA
from veneer.methods.dora import DoRA
from veneer.model import layers, traced
from veneer.model.dpo import dpo
from veneer.model.layers import arrange, as_they_were
from veneer.model.leaf import Leaf
from veneer.model.load import prepare
from veneer.model.losses import cross_entropy
from veneer.train.passes import SEEN, Passes, computed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]
# Of the gradient of all factors together: bfloat16 activations (2^-8) rounded at other places; seen: 2.1e-2.
CLOSE = 3e-2
EQUAL, UNEQUAL = (256, 256), (200, 37, 250)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    made = (
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=1024)).eval().to("cuda", torch.bfloat16)
    )
    prepare(made)
    attach(made, LoraSettings(r=4), "default", seed=0)
    for method in methods_of(made, "default").values():
        method.b_OR.data.normal_(std=0.05)
    return made


def ready(model, lengths, seed=0, graphs=True, loss=cross_entropy):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(320, (length,), generator=generator).tolist() for length in lengths]
    trained, slots = [[i % 3 != 1 for i in range(n)] for n in lengths], ["default"] * len(rows)
    weights = [1.0 / (i + 2) for i in range(len(rows))]
    return Passes(model, graphs).ready(rows, trained, weights, slots, {}, loss)


def gradients(model, run):
    factors = [p for method in methods_of(model, "default").values() for p in method.parameters()]
    for factor in factors:  # in place: a graph adds to the tensors that it was recorded with
        factor.grad = torch.zeros_like(factor) if factor.grad is None else factor.grad.zero_()
    losses_N = run()
    return losses_N, torch.cat([factor.grad.flatten() for factor in factors])


def near(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=CLOSE, atol=CLOSE)
    assert (found[1] - wanted[1]).norm() <= CLOSE * wanted[1].norm()


@pytest.mark.parametrize("lengths", [EQUAL, UNEQUAL])
@pytest.mark.parametrize(
    "how",
    [{"compiled": True}, {"recompute": -1}, {"compiled": True, "recompute": 2}, {"recompute": -1, "offload": True}],
)
def test_every_way_computes_the_same(model, lengths, how):
    as_they_were(model)
    given = ready(model, lengths)
    wanted = gradients(model, lambda: computed(model, given))
    arrange(model, **how)
    near(gradients(model, lambda: computed(model, given)), wanted)


@pytest.mark.parametrize("recompute", [0, 2, -1])
def test_a_gated_mlp_is_one_operation(model, monkeypatch, recompute):
    torch._dynamo.reset()  # after many variants of a layer, those of other tests too, the next one is not compiled
    as_they_were(model)
    given = ready(model, UNEQUAL)
    wanted = gradients(model, lambda: computed(model, given))
    calls, own = [], traced.gate_and_up
    monkeypatch.setattr(traced, "gate_and_up", lambda *given: (calls.append(1), own(*given))[1])
    monkeypatch.setattr(layers, "is_fused", lambda device: True)
    arrange(model, compiled=True, recompute=recompute)
    for _ in range(2):
        near(gradients(model, lambda: computed(model, given)), wanted)
    assert calls
    passes = Passes(model, graphs=True)
    for _ in range(SEEN + 2):
        near(gradients(model, lambda: passes(given)), wanted)
    as_they_were(model)


@pytest.mark.parametrize("lengths", [EQUAL, UNEQUAL])
def test_a_layer_is_compiled_in_one_piece(model, lengths):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arrange(model, compiled=True)
    computed(model, ready(model, lengths))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [EQUAL, UNEQUAL])
def test_a_graph_replays_other_rows_of_its_shape(model, lengths, compiled):
    arrange(model, compiled=compiled, recompute=1)
    passes = Passes(model, graphs=True)
    for seed in range(SEEN + 3):
        given = ready(model, lengths, seed)
        wanted = gradients(model, lambda given=given: computed(model, given))
        near(gradients(model, lambda given=given: passes(given)), wanted)
    assert [held.graph is not None for held in passes.held.values()] == [True]


def test_graphs_of_several_shapes_share_memory(model):
    arrange(model, compiled=True)
    passes = Passes(model, graphs=True)
    shapes = [EQUAL, UNEQUAL, (512, 512)]
    for seed in range(SEEN + 2):
        for lengths in shapes:
            given = ready(model, lengths, seed)
            wanted = gradients(model, lambda given=given: computed(model, given))
            near(gradients(model, lambda given=given: passes(given)), wanted)
    assert [held.graph is not None for held in passes.held.values()] == [True] * len(shapes)


@pytest.mark.parametrize("kind", [DoRA, AnchoredLoRA])
def test_other_methods_compiled_and_recorded(model, kind):
    as_they_were(model)
    other = copy.deepcopy(model)
    for leaf in [module for module in other.modules() if isinstance(module, Leaf) and "default" in module.slots]:
        given = [leaf.slots["default"].a_RI.data, leaf.slots["default"].b_OR.data]
        leaf.slots["default"] = kind(*given, *([leaf.base.row_norms()] if kind is DoRA else []), 0.5).to("cuda")
        for parameter in leaf.slots["default"].parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    given = ready(other, UNEQUAL)
    wanted = gradients(other, lambda: computed(other, given))
    arrange(other, compiled=True, recompute=2)
    near(gradients(other, lambda: computed(other, given)), wanted)
    passes = Passes(other, graphs=True)
    for _ in range(SEEN + 2):
        near(gradients(other, lambda: passes(given)), wanted)
    assert [held.graph is not None for held in passes.held.values()] == [True]


@pytest.mark.parametrize("compiled", [False, True])
def test_pairs_are_recorded_with_their_reference(model, compiled):
    """Four sequences are two pairs; the pass of the base is part of the graph."""
    as_they_were(model)
    loss = partial(dpo, beta=0.5)
    arrange(model, compiled=compiled, recompute=1)
    passes = Passes(model, graphs=True)
    for seed in range(SEEN + 3):
        given = ready(model, (100, 120, 90, 110), seed, loss=loss)
        wanted = gradients(model, lambda given=given: computed(model, given))
        assert wanted[0][0] > 0 and wanted[0][1] == 0
        near(gradients(model, lambda given=given: passes(given)), wanted)
    assert [held.graph is not None for held in passes.held.values()] == [True]


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8", "fp8"])
def test_storages_compiled(model, name):
    from veneer.bases import BASES
    from veneer.bases.dense import Dense
    from veneer.model.quantised import storage_class
    from veneer.model.swap import linear_paths

    assert name in BASES
    as_they_were(model)  # what stands there offloads, and a GPU's events are not copied
    other, decoded = copy.deepcopy(model), copy.deepcopy(model)
    for path in linear_paths(other):
        leaf = other.get_submodule(path)
        leaf.base = storage_class(name).from_weight(leaf.base.weight.detach(), leaf.base.bias)
        decoded.get_submodule(path).base = Dense.from_weight(leaf.base.decode(torch.bfloat16))
        if name == "fp8":
            leaf.base.add_transposed()
    given = ready(other, UNEQUAL)
    for compiled in (False, True):
        arrange(other, compiled=compiled)
        arrange(decoded, compiled=compiled)
        found = gradients(other, lambda: computed(other, given))
        wanted = gradients(decoded, lambda: computed(decoded, given))
        if name == "fp8":  # activations and gradients too are rounded to 3 bits, each number by up to 1/16
            assert (found[1] - wanted[1]).norm() <= 2**-3 * wanted[1].norm()
        else:
            near(found, wanted)


def test_updates_in_backward_are_the_steps_of_all_at_once(model):
    """Compiled and recomputed, in the loop: its steps are not recorded, since each has another rate."""
    from veneer.config import TrainSettings
    from veneer.data.chat import Example
    from veneer.train.fit import fit
    from veneer.train.job import Job
    from veneer.train.loop import loop
    from veneer.train.ranks import ALONE

    found = []
    start = [p.detach().clone() for method in methods_of(model, "default").values() for p in method.parameters()]
    for in_backward in (True, False):
        methods = methods_of(model, "default")
        for value, p in zip(start, [p for method in methods.values() for p in method.parameters()], strict=True):
            p.data, p.grad = value.clone(), None
        rows = [Example(tuple((7 * n * i) % 320 for i in range(64)), (True,) * 64, n, 0) for n in range(8)]
        settings = TrainSettings(
            max_steps=4,
            max_grad_norm=0.0,
            optimizer_in_bwd=in_backward,
            gradient_checkpointing=True,
            learning_rate=1e-3,
        )
        job = Job("default", settings, rows, (), 1e-3, methods)
        graphs, _ = fit(model, job, settings, ALONE)
        assert not (in_backward and graphs)
        told: list[float] = []
        record = partial(lambda losses, _, facts: losses.append(facts["loss"]), told)
        loop(model, [job], record=record, save=lambda _: None, graphs=graphs)
        found.append((torch.tensor(told), job.flat.values_P.detach().clone()))
        as_they_were(model)
    for p, value in zip([p for m in methods_of(model, "default").values() for p in m.parameters()], start, strict=True):
        p.data, p.grad = value.clone(), None
    near(*found)
