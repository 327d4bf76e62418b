"""Passes: what is copied into the tensors of a recorded shape computes what the pass itself does.

The graph is CUDA's (tests/gpu/test_passes_cuda.py); here the tensors that it would read are computed on the CPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings
from veneer.errors import ModelError
from veneer.model.packed import check_positions
from veneer.model.varlen import varlen_of
from veneer.train.passes import (
    GRAPHS,
    REMEMBERED,
    SEEN,
    Pass,
    Passes,
    Recorded,
    buffers,
    computed,
    fill,
    grain,
    shape_of,
)


@pytest.fixture
def adapted(pico):
    attach(pico, LoraSettings(r=2), "default", seed=0)
    for method in methods_of(pico, "default").values():
        method.b_OR.data.normal_(generator=torch.Generator().manual_seed(0))
    return pico


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def ready(model, lengths, seed=0, graphs=True, dropout=None) -> Pass:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(90, (length,), generator=generator).tolist() for length in lengths]
    trained = [[i % 3 != 1 for i in range(length)] for length in lengths]
    slots, weights = ["default"] * len(rows), [1.0 / (i + 2) for i in range(len(rows))]
    return Passes(model, graphs).ready(rows, trained, weights, slots, dropout or {})


def gradients(model, given: Pass):
    for parameter in model.parameters():
        parameter.grad = None
    losses_N = computed(model, given)
    return losses_N, [p.grad for p in model.parameters() if p.grad is not None]


def test_attention_with_caps_is_computed_by_lengths_and_never_on_buffers():
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = attach(Gemma2ForCausalLM(config).eval(), LoraSettings(r=2), "default")
    passes = Passes(model, graphs=True)
    assert not passes.graphs
    given = ready(model, [50, 37, 20])
    assert torch.equal(passes(given), computed(model, given))
    shape = shape_of(ready(model, [50, 37, 20]))
    assert shape is not None
    with pytest.raises(RuntimeError, match="whose lengths are not"):
        computed(model, buffers(shape, torch.device("cpu")))


def test_positions_are_checked_of_sequences_and_not_of_buffers():
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = attach(OPTForCausalLM(config).eval(), LoraSettings(r=2), "default")
    given = ready(model, [50, 37])
    check_positions(model, buffers(shape_of(given), torch.device("cpu")).stream)
    with pytest.raises(ModelError, match="a sequence of 65 tokens"):
        ready(model, [65, 3])


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=LENGTHS, second=LENGTHS)
def test_a_pass_in_the_buffers_of_its_shape_computes_the_same(adapted, first, second):
    """Also when another pass was there before."""
    given = ready(adapted, second, seed=2)
    wanted, gradients_wanted = gradients(adapted, given)
    shape = shape_of(given)
    here = buffers(shape, torch.device("cpu"))
    other = ready(adapted, first, seed=1)
    if shape_of(other) == shape:
        fill(here, other)
    fill(here, given)
    # On the CPU attention reads lengths where the GPU's kernel reads the plan's tensors.
    stream = dataclasses.replace(here.stream, lengths=given.stream.lengths, parents=given.stream.parents, rounded=False)
    found, gradients_found = gradients(adapted, here._replace(stream=stream))
    assert torch.equal(found[: len(wanted)], wanted) and not found[len(wanted) :].any()
    for got, want in zip(gradients_found, gradients_wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=LENGTHS)
def test_the_plan_of_a_shape_holds_every_segment(adapted, lengths):
    given = ready(adapted, lengths)
    shape, plan = shape_of(given), varlen_of(given.stream)
    here = buffers(shape, torch.device("cpu"))
    fill(here, given)
    held = varlen_of(here.stream)
    assert held.starts[: len(plan.starts)].tolist() == plan.starts.tolist()
    assert set(held.starts[len(plan.starts) :].tolist()) <= {shape.tokens}  # empty segments at the end
    assert held.longest >= plan.longest and held.equal == plan.equal


@pytest.mark.parametrize("rows, length", [(33, 32), (35, 64), (3, 20), (33, 128)])
def test_what_fills_a_stream_up_may_be_as_long_as_a_row(adapted, rows, length):
    given = ready(adapted, [length] * rows)
    fill(buffers(shape_of(given), torch.device("cpu")), given)


def test_what_a_graph_cannot_hold(adapted):
    rows = [list(range(40)), [*list(range(40)), 1, 2]]
    parts = ([[True] * 40, [True] * 42], [1.0, 1.0], ["default"] * 2)
    assert shape_of(Passes(adapted, True).ready(rows, *parts, {})) is None  # most tokens are shared
    assert shape_of(ready(adapted, [5, 6], dropout={"default": 1})) is None
    mixed = Passes(adapted, True).ready([[1, 2], [3]], [[True] * 2, [True]], [1.0, 1.0], ["default", "x"], {})
    assert shape_of(mixed) is None


def test_little_in_common_is_not_shared_where_graphs_are_recorded(adapted):
    rows = [list(range(20)) + [i] * 200 for i in range(3)]
    parts = ([[True] * 220] * 3, [1.0] * 3, ["default"] * 3, {})
    assert Passes(adapted, False).ready(rows, *parts).stream.branches
    assert not Passes(adapted, True).ready(rows, *parts).stream.branches


@given(tokens=st.integers(0, 1 << 20))
def test_rounding_up_costs_a_sixteenth_at_most(tokens):
    step = grain(tokens)
    assert step % 32 == 0 and (step == 32 or step <= tokens / 16)


@pytest.fixture
def recording(monkeypatch):
    """Shapes that were recorded; what they would replay is computed, with lengths that the CPU's attention reads."""
    made = []

    def computed_here(self, given):
        self.passes += 1
        return "replayed" if self.graph else "computed"

    def record(self, pool):
        made.append(pool)
        self.graph = "a graph"
        return (0, 1)

    monkeypatch.setattr(Recorded, "__call__", computed_here)
    monkeypatch.setattr(Recorded, "record", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return made


def test_a_shape_is_recorded_when_it_comes_back(adapted, recording):
    passes, given = Passes(adapted, graphs=True), ready(adapted, [9, 8])
    assert [passes(given) for _ in range(SEEN + 2)] == ["computed"] * SEEN + ["replayed"] * 2
    assert recording == [None]
    for length in range(GRAPHS + 3):
        for _ in range(SEEN + 1):
            passes(ready(adapted, [32 * (length + 2)]))
    assert recording == [None] + [(0, 1)] * (GRAPHS - 1)  # all in the same memory, and no more than that


def test_shapes_that_never_come_back_are_forgotten(adapted, recording):
    passes = Passes(adapted, graphs=True)
    for length in range(REMEMBERED + 9):
        passes(ready(adapted, [32 * (length + 1)] * 2))
        passes(ready(adapted, [300]))
    assert len(passes.held) <= REMEMBERED + 1 and len(recording) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted when stream is capturing"), torch.OutOfMemoryError("out of memory")]
)
def test_what_cannot_be_recorded_is_computed(adapted, recording, monkeypatch, error):
    streams = []

    def fails(self, pool):
        try:
            raise error
        finally:
            raise RuntimeError("capture_end")

    monkeypatch.setattr(Recorded, "record", fails)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    passes, given = Passes(adapted, graphs=True), ready(adapted, [9, 8])
    for _ in range(SEEN):
        passes(given)
    with pytest.warns(UserWarning, match=str(error)):
        assert passes(given) == "computed"
    assert not passes.graphs and streams == ["before"]
