"""Streams whose sequences share their beginnings. Plain streams: test_packed.py."""

from __future__ import annotations

from itertools import combinations
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings
from veneer.model import stream as streams
from veneer.model.load import prepare
from veneer.model.losses import cross_entropy, targets_of
from veneer.model.packed import running
from veneer.model.stream import pack

LEAST = 3  # in place of SHARED: with two tokens to choose from, a sequence of ten has company
tokens = st.integers(0, 1)
sequences = st.lists(st.lists(tokens, min_size=1, max_size=12), min_size=1, max_size=7)


def common(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(drawn=sequences, multiple=st.integers(1, 9))
def test_every_sequence_is_there_and_beginnings_are_shared_down_to_less_than_the_least(drawn, multiple):
    with mock.patch.object(streams, "SHARED", LEAST):
        stream = pack(drawn, share=True, multiple=multiple)
    rows = [stream.rows_of(segment) for segment in stream.sequences]
    for sequence, here in zip(drawn, rows, strict=True):
        assert stream.token_ids_T[here].tolist() == sequence
        assert stream.positions_T[here].tolist() == list(range(len(sequence)))
    for (a, rows_a), (b, rows_b) in combinations(zip(drawn, rows, strict=True), 2):
        together = common(rows_a, rows_b)
        assert set(rows_a) & set(rows_b) == set(rows_a[:together])  # what is shared is the beginning
        assert together <= common(a, b) < together + LEAST
    assert sum(stream.lengths) == len(stream.token_ids_T) and 0 not in stream.lengths
    assert len(stream.token_ids_T) % multiple == 0
    held = len({row for here in rows for row in here})
    assert 0 <= len(stream.token_ids_T) - held < multiple  # the rest only fills up


@given(drawn=sequences, data=st.data())
def test_slots_share_nothing_and_each_speaks_over_its_own(drawn, data):
    slots = sorted(data.draw(st.sampled_from(["", "one", "two"])) for _ in drawn)
    slots = [slot or None for slot in slots]
    with mock.patch.object(streams, "SHARED", LEAST):
        stream = pack(drawn, slots, share=True, multiple=4)
    speaker = [None] * len(stream.token_ids_T)
    for span in stream.spans:
        speaker[span.start : span.stop] = [span.slot] * (span.stop - span.start)
    for slot, segment in zip(slots, stream.sequences, strict=True):
        assert {speaker[row] for row in stream.rows_of(segment)} == {slot}


def test_a_slot_with_dropout_shares_nothing():
    """Each sequence draws its own mask."""
    drawn = [[1] * 20, [1] * 20]
    assert pack(drawn, ["one"] * 2, share=True).lengths == (20,)
    assert pack(drawn, ["one"] * 2, dropout_keys={"one": 7}, share=True).lengths == (20, 20)
    assert pack(drawn, ["one"] * 2, dropout_keys={"two": 7}, share=True).lengths == (20,)


def test_what_fills_up_belongs_to_the_last_slot_unless_it_draws_masks():
    drawn = [[1] * 20, [2] * 21]
    assert pack(drawn, ["one", "two"], multiple=32).spans[-1] == (20, 64, "two", 1.0)
    assert pack(drawn, ["one", "two"], dropout_keys={"two": 7}, multiple=32).spans[-1] == (20, 41, "two", 1.0)


def test_a_deep_tree_and_sequences_of_any_kind():
    deep = pack([[0] * streams.SHARED * i for i in range(1, 1200)], share=True)
    assert len(deep.token_ids_T) == streams.SHARED * 1199
    assert pack([[1, 2], (3, 4)], share=True).lengths == (2, 2)


def test_the_same_stream_comes_out_whatever_the_order_within_equal_beginnings():
    begin = list(range(streams.SHARED))
    one, two = pack([[*begin, 5], [*begin, 4]], share=True), pack([[*begin, 4], [*begin, 5]], share=True)
    assert torch.equal(one.token_ids_T, two.token_ids_T) and one.last == two.last[::-1] == (2, 1)


# The loss and its gradient for the hidden states are float32 in both: 2⁻²⁴, and what the layers make of it.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_losses_and_gradients_are_those_of_sequences_apart(pico, dtype, tolerance):
    """A system prompt for all, a longer beginning for some, one sequence twice, one that another continues."""
    for parameter in pico.parameters():
        parameter.data = parameter.data.to(dtype) * (15 if parameter.dim() > 1 else 1)
    prepare(pico)
    attach(pico, LoraSettings(r=3))
    generator = torch.Generator().manual_seed(0)
    for method in methods_of(pico, "default").values():
        method.b_OR.data = torch.randn(method.b_OR.shape, generator=generator) * 0.1
    ids = torch.randint(3, 96, (90,), generator=generator).tolist()
    system, longer = ids[:20], ids[:45]
    drawn = [system + ids[50:60], longer + ids[60:70], longer + ids[70:90], longer, system + ids[50:60], ids[80:]]
    trained = [[i % 3 > 0 for i in range(len(sequence))] for sequence in drawn]
    found = []
    for share in (False, True):
        stream = pack(drawn, ["default"] * len(drawn), share=share, multiple=32 if share else 1)
        pico.zero_grad()
        with running(pico, stream):
            sums_N, counts_N = cross_entropy(pico, stream, targets_of(stream, trained))
            (sums_N * torch.arange(1, 7)).sum().backward()
        gradients = [p.grad for m in methods_of(pico, "default").values() for p in (m.a_RI, m.b_OR)]
        found.append([sums_N.detach(), counts_N, *gradients])
    assert len(stream.token_ids_T) < 0.6 * sum(map(len, drawn))
    for apart, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, apart, rtol=0, atol=tolerance * float(apart.abs().max()))
