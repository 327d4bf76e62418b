"""Attention within segments against the definition in float64, and how segments are put into buckets.

Legend: T tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veneer.model import buckets, segments
from veneer.model.attention import packed_attention
from veneer.model.buckets import Buckets
from veneer.model.stream import Stream, pack

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=7)


@st.composite
def shapes(draw) -> tuple[list[int], list[int | None]]:
    """Lengths of segments, and for some of them an earlier one that they continue."""
    drawn = draw(lengths)
    continued = [None, *(draw(st.none() | st.integers(0, i - 1)) for i in range(1, len(drawn)))]
    return drawn, continued


def stream_of(lengths, parents=(), device="cpu") -> Stream:
    stream = pack([[1] * n for n in lengths], device=device)
    return dataclasses.replace(stream, parents=tuple(parents) or stream.parents)


def inputs(
    lengths, heads: int, groups: int, size: int, dtype=torch.float32, device="cpu", seed: int = 0
) -> list[Tensor]:
    """Query, key, value as a model hands them over: views with heads and tokens swapped."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, sum(lengths), n, size) for n in (heads * groups, heads, heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def packed(q, k, v, lengths, scaling=None, parents=(), **bent) -> Tensor:
    stream = stream_of(lengths, parents, q.device)
    out, weights = packed_attention(
        None, *(x.transpose(1, 2) for x in (q, k, v)), None, scaling=scaling, veneer_stream=stream, **bent
    )
    assert weights is None
    return out


def by_definition(q, k, v, lengths, scaling=None, parents=(), sliding_window=None, softcap=None, s_aux=None) -> Tensor:
    """softmax(q k' · scale + causal) v of each segment and head alone, in float64: (1, T, H, D). The keys of a segment
    are all of the segments that it continues, and its own up to the query."""
    q, k, v = (x.double()[0] for x in (q, k, v))
    scaling, groups = q.shape[-1] ** -0.5 if scaling is None else scaling, q.shape[1] // k.shape[1]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    parts = []
    for segment, n in enumerate(lengths):
        keys, parent = [*range(starts[segment], starts[segment] + n)], (parents or [None] * len(lengths))[segment]
        while parent is not None:
            keys = [*range(starts[parent], starts[parent + 1]), *keys]
            parent = parents[parent]
        heads = []
        for head in range(q.shape[1]):
            scores = q[keys[-n:], head] @ k[keys, head // groups].t() * scaling
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            scores = scores + torch.full_like(scores, float("-inf")).triu(1 + len(keys) - n)
            if sliding_window is not None:
                scores = scores + torch.full_like(scores, float("-inf")).tril(len(keys) - n - sliding_window)
            if s_aux is not None:
                scores = torch.cat([scores, s_aux[head].double().expand(n, 1)], 1)
            heads.append(scores.softmax(-1)[:, : len(keys)] @ v[keys, head // groups])
        parts.append(torch.stack(heads, 1))
    return torch.cat(parts)[None]


def both(case, lengths, scaling=None, parents=(), **bent):
    """Outputs and gradients for q, k, v of the packed way and of the definition."""
    results = []
    for forward in (packed, by_definition):
        leaves = [x.detach().clone().requires_grad_() for x in case]
        out = forward(*leaves, lengths, scaling, parents, **bent)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
        results.append([out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)])
    return results


@settings(max_examples=50)
@given(
    shape=shapes(),
    heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    size=st.sampled_from([2, 8, 16]),
    scaling=st.sampled_from([None, 0.5]),
    short=st.sampled_from([0, 10, segments.SHORT]),
)
def test_it_is_causal_attention_within_each_chain(shape, heads, groups, size, scaling, short):
    """Any lengths, chains and heads, through buckets, through the flash kernel (SHORT 0) and through both."""
    lengths, parents = shape
    with mock.patch.object(segments, "SHORT", short), mock.patch.object(buckets, "BUCKET", 20):
        got, wanted = both(inputs(lengths, heads, groups, size), lengths, scaling, parents)
    for mine, theirs in zip(got, wanted, strict=True):
        # float32: scores of size 4 are off by 4 · 2⁻²³, sums of 30 terms by a few ulp more. Seen: 2e-6.
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=2e-5)


@settings(max_examples=60)
@given(
    shape=shapes(),
    groups=st.integers(1, 3),
    window=st.none() | st.integers(1, 40),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    short=st.sampled_from([1, 3, 10, segments.SHORT]),
)
def test_windows_caps_and_sinks(shape, groups, window, softcap, sinks, short):
    """As Mistral, Gemma 2 and gpt-oss have them, in any combination; SHORT is also a long segment's block."""
    lengths, parents = shape
    s_aux = torch.linspace(-2, 2, 2 * groups) if sinks else None
    bent = {"sliding_window": window, "softcap": softcap, "s_aux": s_aux}
    with mock.patch.object(segments, "SHORT", short), mock.patch.object(buckets, "BUCKET", 20):
        got, wanted = both(inputs(lengths, 2, groups, 8), lengths, 1.0, parents, **bent)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("short", [0, segments.SHORT])
def test_bfloat16_is_off_by_the_rounding_of_its_values_only(short):
    """Probabilities and results are rounded to 2⁻⁹ of their size; scores are not (they are kept in float32)."""
    lengths = [30, 7, 1, 22]
    case = [x.detach() for x in inputs(lengths, 2, 3, 16, torch.bfloat16)]
    # Scores of up to 40: rounded to bfloat16 they would be off by 0.1, and the probabilities by 10 %.
    with mock.patch.object(segments, "SHORT", short):
        got, wanted = both(case, lengths, scaling=2.0)
    # In 2⁻⁹: output, then gradients of q, k, v. Seen: 0.9, 6.7, 6.5, 1.5; transformers' eager attention, whose scores
    # are in bfloat16: 2.6, 6.6, 7.5, 3.1; ours with such scores: 2.6, 9.3, 10.0, 3.0.
    for mine, theirs, bound in zip(got, wanted, (1.5, 8, 8, 2.5), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs.double()).norm() < bound * 2**-9 * theirs.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("parents", [(), (None, 0, 1, None, 0)])
@pytest.mark.parametrize("bent", [{}, {"sliding_window": 25}, {"softcap": 2.0}])
def test_the_same_on_cuda(dtype, groups, parents, bent):
    lengths = [30, 7, 1, 22, 700]
    case = [x.detach() for x in inputs(lengths, 2, groups, 64, dtype, "cuda")]
    got, wanted = both(case, lengths, parents=parents, **bent)
    for mine, theirs in zip(got, wanted, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 4 * 2**-9
        assert (mine.double() - theirs.double()).norm() < bound * theirs.double().norm()


@given(shape=shapes(), broken=st.integers(0, 6), short=st.sampled_from([0, 10, segments.SHORT]))
def test_nan_in_one_segment_stays_there_and_in_what_continues_it(shape, broken, short):
    lengths, parents = shape
    broken %= len(lengths)
    while broken in parents:  # the last of its chain: nobody else sees it
        broken = parents.index(broken)
    stream = stream_of(lengths, parents)
    rows = slice(stream.starts[broken], stream.starts[broken + 1])
    with mock.patch.object(segments, "SHORT", short):
        clean = both(inputs(lengths, 2, 2, 8), lengths, parents=parents)[0]
        case = [x.detach() for x in inputs(lengths, 2, 2, 8)]
        for tensor in case:
            tensor[:, rows] = float("nan")
        leaves = [x.requires_grad_() for x in case]
        out = packed(*leaves, lengths, parents=parents)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        found = [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]
    assert found[0][:, rows].isnan().all()
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[rows] = False
    torch.testing.assert_close(found[0][:, others], clean[0][:, others])
    others[stream.rows_of(broken)] = False  # what it continues gets its gradient
    for mine, wanted in zip(found[1:], clean[1:], strict=True):
        torch.testing.assert_close(mine[:, others], wanted[:, others])


@given(shape=shapes(), short=st.sampled_from([0, 10, segments.SHORT]), bucket=st.sampled_from([0, 50, 10**6]))
def test_buckets_hold_every_short_segment_once_and_pad_for_less_than_a_bucket_costs(shape, short, bucket):
    stream = stream_of(*shape)
    with mock.patch.object(segments, "SHORT", short), mock.patch.object(buckets, "BUCKET", bucket):
        made = Buckets(stream, 1, None, short)
    sizes = list(zip(stream.lengths, stream.seen, strict=True))
    assert sorted([i for group in made.members for i in group] + made.long) == list(range(len(sizes)))
    assert set(made.long) == {i for i, (queries, keys) in enumerate(sizes) if queries * keys > short**2}
    for group, rows_NL, keys_NM in zip(made.members, made.queries.rows, made.keys.rows, strict=True):
        most = [max(column) for column in zip(*(sizes[i] for i in group), strict=True)]
        assert [rows_NL.shape, keys_NM.shape] == [(len(group), most[0]), (len(group), most[1])]
        needed = sum(queries * keys for queries, keys in (sizes[i] for i in group))
        assert rows_NL.shape[0] * rows_NL.shape[1] * keys_NM.shape[1] <= needed + (len(group) - 1) * bucket


def test_buckets_are_made_once_a_stream():
    q, k, v = (x.transpose(1, 2) for x in inputs([5, 9], 1, 1, 4))
    stream = stream_of([5, 9])
    with mock.patch.object(segments, "Buckets", wraps=Buckets) as made:
        for _ in range(3):
            packed_attention(None, q, k, v, None, veneer_stream=stream)
    assert made.call_count == 1


@pytest.mark.parametrize("layout", ["by head", "by token", "slices of one product"])
def test_tensors_may_lie_in_memory_as_the_model_left_them(layout):
    """Phi-3 and GPT-NeoX cut query, key and value out of one product: rows of a wider tensor."""
    lengths, case = [5, 9, 2], [x.detach() for x in inputs([5, 9, 2], 2, 1, 4)]
    wanted = both(case, lengths)[1][0]
    if layout == "by head":
        q, k, v = (x.transpose(1, 2).contiguous() for x in case)
    elif layout == "by token":
        q, k, v = (x.transpose(1, 2) for x in case)
    else:
        q, k, v = (x.transpose(1, 2) for x in torch.cat(case, -1).chunk(3, -1))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = packed_attention(None, *leaves, None, veneer_stream=stream_of(lengths))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=2e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad((out * weights).sum(), leaves)
    for mine, theirs in zip(grads, both(case, lengths)[1][1:], strict=True):
        torch.testing.assert_close(mine.transpose(1, 2).double(), theirs.double(), rtol=1e-4, atol=2e-5)


def test_a_lost_stream_is_an_error():
    q, k, v = (x.transpose(1, 2) for x in inputs([3], 1, 1, 4))
    with pytest.raises(RuntimeError, match="stream was lost"):
        packed_attention(None, q, k, v, None)
