"""Losses per segment against the model's own logits and torch's cross-entropy.

Legend: T tokens, N targets, D hidden size, V vocabulary, S segments.
"""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings
from veneer.errors import VeneerError
from veneer.kernels import cross_entropy as kernel
from veneer.model import losses
from veneer.model.head import Head
from veneer.model.losses import head_nll, sequence_nll, targets_of
from veneer.model.packed import speaking
from veneer.model.stream import SHARED, pack


@dataclasses.dataclass
class Row:
    input_ids: tuple[int, ...]
    targets: tuple[bool, ...]


@st.composite
def rows(draw, least: int = 1):
    made = []
    for _ in range(draw(st.integers(least, 5))):
        n = draw(st.integers(1, 12))
        ids = draw(st.lists(st.integers(0, 95), min_size=n, max_size=n))
        made.append(Row(tuple(ids), tuple(draw(st.lists(st.booleans(), min_size=n, max_size=n)))))
    return made


@given(rows=rows())
def test_targets_are_predicted_from_the_token_before(rows):
    """Row by row from the definition; a first token is never a target, and nothing crosses a border."""
    stream = pack([row.input_ids for row in rows])
    targets = targets_of(stream, [row.targets for row in rows])
    wanted, start = [], 0
    for number, row in enumerate(rows):
        wanted += [(start + i - 1, row.input_ids[i], number) for i in range(1, len(row.input_ids)) if row.targets[i]]
        start += len(row.input_ids)
    assert triples(targets) == wanted


def triples(targets) -> list[tuple[int, int, int]]:
    columns = (targets.rows_M, targets.tokens_M, targets.sequences_M)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_targets_of_sequences_that_share_their_beginning():
    """The first token after it is predicted from its last row, in each sequence; a target in it counts for each."""
    begin = list(range(20, 20 + SHARED))
    sequences = [[*begin, 1, 2], [*begin, 3]]
    stream = pack(sequences, share=True, multiple=8)
    assert (stream.lengths, stream.parents, stream.last) == ((16, 2, 1, 5), (None, 0, 0, None), (1, 2))
    trained = [[False] * 14 + [True] * 4, [False] * 14 + [True] * 3]
    last = SHARED - 1
    assert triples(targets_of(stream, trained)) == [
        *((13, 34, 0), (14, 35, 0), (last, 1, 0), (16, 2, 0)),
        *((13, 34, 1), (14, 35, 1), (last, 3, 1)),
    ]


# The head.


@given(
    targets=st.integers(0, 20),
    vocabulary=st.integers(1, 30),
    bias=st.booleans(),
    chunk=st.integers(1, 21),
    block=st.integers(1, 21),
    seed=st.integers(0, 999),
)
def test_the_chunked_head_is_cross_entropy_of_the_logits(targets, vocabulary, bias, chunk, block, seed):
    """Values and gradients, also where the last chunk is short or there is no target at all."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(6, vocabulary, bias=bias)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    hidden = torch.randn(targets, 6, generator=generator).requires_grad_()
    tokens = torch.randint(vocabulary, (targets,), generator=generator)
    g = torch.randn(targets, generator=generator)
    with mock.patch.object(losses, "CHUNK", chunk), mock.patch.object(kernel, "BLOCK", block):
        nll = head_nll(hidden, Head(head), tokens)
        (got,) = torch.autograd.grad(nll, hidden, g)
    wanted = F.cross_entropy(head(hidden), tokens, reduction="none")
    (wanted_grad,) = torch.autograd.grad(wanted, hidden, g)
    # float32: a logarithm of sums of 30 terms, a few ulp of values of size 10.
    torch.testing.assert_close(nll, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, wanted_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [losses.CHUNK - 1, losses.CHUNK, losses.CHUNK + 1, 2 * losses.CHUNK + 3])
def test_the_real_chunk_size_at_its_borders(targets):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(4, 7).requires_grad_(False)
    hidden = torch.randn(targets, 4, generator=generator).requires_grad_()
    tokens = torch.randint(7, (targets,), generator=generator)
    nll = head_nll(hidden, Head(head), tokens)
    torch.testing.assert_close(nll, F.cross_entropy(head(hidden), tokens, reduction="none"), rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(nll.sum(), hidden)
    (wanted,) = torch.autograd.grad(F.cross_entropy(head(hidden), tokens, reduction="sum"), hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_only_a_chunk_of_logits_exists_at_a_time():
    seen = []
    turned = losses.cross_entropy_

    def watched(logits_MV, *rest):
        seen.append(len(logits_MV))
        return turned(logits_MV, *rest)

    with mock.patch.object(losses, "CHUNK", 3), mock.patch.object(losses, "cross_entropy_", watched):
        head_nll(torch.randn(8, 4), Head(nn.Linear(4, 5)), torch.zeros(8, dtype=torch.int64))
    assert seen == [3, 3, 2]


def test_nan_rows_of_the_head_stay_alone_in_value_and_gradient():
    head = nn.Linear(4, 7).requires_grad_(False)
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    hidden[2] = float("nan")
    hidden.requires_grad_()
    nll = head_nll(hidden, Head(head), torch.arange(6))
    (grad,) = torch.autograd.grad(nll.sum(), hidden)
    assert nll.isnan().tolist() == [False, False, True, False, False, False]
    assert grad.isnan().any(1).tolist() == [False, False, True, False, False, False]


def test_a_weight_of_zero_silences_an_infinite_segment_nowhere_else():
    """The loop divides each segment's sum by its own number of targets: the upstream gradient differs by row."""
    head = nn.Linear(4, 7).requires_grad_(False)
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens, g = torch.tensor([1, 2, 3]), torch.tensor([0.5, 0.0, float("nan")])
    (grad,) = torch.autograd.grad(head_nll(hidden, Head(head), tokens), hidden, g)
    (whole,) = torch.autograd.grad(F.cross_entropy(head(hidden), tokens, reduction="sum"), hidden)
    torch.testing.assert_close(grad[0], whole[0] * 0.5)
    assert not grad[1].any() and grad[2].isnan().all()


def test_bfloat16_heads_lose_no_more_than_their_logits_do():
    """The logits are bfloat16 (as the model's own are), the logarithm float32: equal to the model's own way exactly."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50, bias=False).bfloat16().requires_grad_(False)
    hidden = torch.randn(9, 16, generator=generator).bfloat16().requires_grad_()
    tokens = torch.randint(50, (9,), generator=generator)
    nll = head_nll(hidden, Head(head), tokens)
    wanted = F.cross_entropy(head(hidden).float(), tokens, reduction="none")
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, wanted, rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad(nll.sum(), hidden)
    (theirs,) = torch.autograd.grad(wanted.sum(), hidden)
    assert (got.float() - theirs.float()).norm() < 2**-6 * theirs.float().norm()  # both round probabilities to 2⁻⁹


# Sequences.


@pytest.fixture(scope="module")
def adapted():
    """A pico model with one slot whose B is random, and its head far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
        model = LlamaForCausalLM(config).eval()
        attach(model, LoraSettings(r=2))
        for method in methods_of(model, "default").values():
            nn.init.normal_(method.b_OR, 0, 0.1)
    return model


def by_model(model, row: Row, slot) -> float:
    """From the model's own logits of the row alone."""
    ids = torch.tensor([row.input_ids])
    with torch.no_grad(), speaking(model, slot):
        nll = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    return nll[torch.tensor(row.targets[1:], dtype=torch.bool)].sum().item()


@settings(max_examples=20)
@given(rows=rows(least=0), slot=st.sampled_from([None, "default"]), most=st.integers(1, 40))
def test_sequence_nll_is_that_of_the_models_own_logits(adapted, rows, slot, most):
    """However the rows are packed into streams."""
    found = sequence_nll(adapted, rows, slot, max_tokens=most)
    assert [count for _, count in found] == [sum(row.targets[1:]) for row in rows]
    for (nll, count), row in zip(found, rows, strict=True):
        assert math.isclose(nll, by_model(adapted, row, slot), rel_tol=1e-4, abs_tol=1e-4 * max(count, 1))


@given(rows=rows(), most=st.integers(1, 40))
def test_streams_hold_neighbours_while_they_fit(rows, most):
    groups = list(losses.streams_of(rows, most))
    assert [row for group in groups for row in group] == rows
    for group in groups:
        assert len(group) == 1 or sum(len(row.input_ids) for row in group) <= most


def test_sequence_nll_refuses_a_name_that_is_not_attached(adapted):
    """Else the base's loss would be reported as the adapter's."""
    with pytest.raises(VeneerError, match="defualt"):
        sequence_nll(adapted, [Row((1, 2, 3), (False, True, True))], "defualt")


@pytest.mark.parametrize("head", [{"scale": 0.3}, {"softcap": 1.5}, {"scale": 3.0, "softcap": 2.0}])
def test_a_scaled_or_capped_head(head):
    torch.manual_seed(0)
    linear, tokens = nn.Linear(8, 11).double(), torch.arange(600) % 11
    hidden = torch.randn(600, 8, dtype=torch.float64, requires_grad=True)
    shaped = Head(linear, **head)
    nll = head_nll(hidden, shaped, tokens)
    wanted = nn.functional.cross_entropy(shaped(hidden), tokens, reduction="none")
    torch.testing.assert_close(nll.double(), wanted, rtol=1e-6, atol=1e-6)
    g = torch.randn(600, dtype=torch.float64)
    (found,), (expected,) = (torch.autograd.grad((each.double() * g).sum(), hidden) for each in (nll, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
