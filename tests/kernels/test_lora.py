"""The fused LoRA layer against autograd over `LoRA.delta`, the oracle, in float64.

Legend: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from veneer.bases.dense import Dense
from veneer.kernels.lora import Cast, Piece, lora_linear, lora_linears
from veneer.methods.lora import LoRA

# Both sides are float64 sums of at most 40 terms of size 1, in different orders: 40 · 2⁻⁵³ is 5e-15.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


@st.composite
def cases(draw):
    """A layer, a number of factor pairs, and pieces that may overlap, share a pair, be empty or leave rows out."""
    tokens, inside, outside = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    pieces = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, tokens))
        stop = draw(st.integers(start, tokens))
        scale = draw(st.sampled_from([1.0, 2.0, -0.5, 0.3]))
        pieces.append(Piece(start, stop, draw(st.integers(0, len(ranks) - 1)), scale))
    return tokens, inside, outside, ranks, pieces, draw(st.booleans()), draw(st.integers(0, 1000))


def layer(inside: int, outside: int, bias: bool, generator: torch.Generator, dtype: torch.dtype) -> Dense:
    weight = torch.randn(outside, inside, generator=generator, dtype=torch.float64).to(dtype)
    offset = nn.Parameter(torch.randn(outside, generator=generator, dtype=torch.float64).to(dtype)) if bias else None
    return Dense(nn.Parameter(weight), offset)


def factor_pairs(ranks, inside, outside, generator, dtype):
    made = []
    for rank in ranks:
        a_RI = torch.randn(rank, inside, generator=generator, dtype=torch.float64).to(dtype)
        made.append((a_RI, torch.randn(outside, rank, generator=generator, dtype=torch.float64).to(dtype)))
    return made


def by_delta(x_TI, base, pieces, factors):
    """The same layer from its parts: the plain product, and `LoRA.delta` on the rows of each piece."""
    y_TO = x_TI @ base.weight.t()
    total = y_TO if base.bias is None else y_TO + base.bias
    for start, stop, pair, scale, _ in pieces:
        holder = SimpleNamespace(pair=lambda held=factors[pair]: held, scale=scale)  # the very tensors
        delta = LoRA.delta(holder, x_TI[start:stop], y_TO[start:stop], base)
        above, below = delta.new_zeros(start, delta.shape[1]), delta.new_zeros(len(x_TI) - stop, delta.shape[1])
        total = total + torch.cat([above, delta, below])
    return total


def run(forward, case, dtype=torch.float64, frozen=(), x_grad=True):
    """Output, gradient of x, gradients of the factors (None where frozen)."""
    tokens, inside, outside, ranks, pieces, bias, seed = case
    generator = torch.Generator().manual_seed(seed)
    base = layer(inside, outside, bias, generator, dtype)
    x_TI = torch.randn(tokens, inside, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(x_grad)
    factors = factor_pairs(ranks, inside, outside, generator, dtype)
    flat = [tensor for pair in factors for tensor in pair]
    for index, tensor in enumerate(flat):
        tensor.requires_grad_(index not in frozen)
    y_TO = forward(x_TI, base, pieces, factors)
    weights_TO = torch.randn(tokens, outside, generator=generator, dtype=torch.float64).to(dtype)
    if y_TO.requires_grad:
        (y_TO * weights_TO).sum().backward()
    assert base.weight.grad is None  # the base is frozen
    return y_TO.detach(), x_TI.grad, [tensor.grad for tensor in flat]


def assert_same(got, wanted, **tolerance):
    if got is None or wanted is None:  # one says "no gradient", the other a gradient of zero: the same
        present = got if got is not None else wanted
        assert present is None or not present.any()
    else:
        torch.testing.assert_close(got, wanted, **tolerance)


@given(case=cases())
def test_output_and_all_gradients_equal_the_oracle(case):
    got, wanted = run(lora_linear, case), run(by_delta, case)
    assert_same(got[0], wanted[0], **EXACT)
    assert_same(got[1], wanted[1], **EXACT)
    for mine, theirs in zip(got[2], wanted[2], strict=True):
        assert_same(mine, theirs, **EXACT)


def neighbours(forward):
    """`forward` with factors cut from one piece of memory, every A before every B, as a job's parameters lie."""

    def cut(x, base, pieces, factors):
        flat = [a for a, _ in factors] + [b for _, b in factors]
        parts = torch.cat([tensor.flatten() for tensor in flat]).split([tensor.numel() for tensor in flat])
        views = [part.view_as(old) for part, old in zip(parts, flat, strict=True)]
        cast = Cast(
            [v for pair in zip(views[: len(factors)], views[len(factors) :], strict=True) for v in pair], x.dtype
        )
        assert cast.block_RI is not None and torch.equal(cast.block_RI, torch.cat(cast.a))
        return forward(x, base, pieces, list(zip(views[: len(factors)], views[len(factors) :], strict=True)))

    return cut


@given(case=cases(), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_factors_that_are_neighbours_in_memory_give_the_same(case, dtype):
    got, wanted = run(neighbours(lora_linear), case, dtype), run(lora_linear, case, dtype)
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 2**-6, "atol": 2**-6 * 40}  # sums in another order
    for mine, theirs in zip((*got[:2], *got[2]), (*wanted[:2], *wanted[2]), strict=True):
        assert_same(mine, theirs, **tolerance)


@given(case=cases(), frozen=st.sets(st.integers(0, 5)))
def test_frozen_factors_get_no_gradient_and_change_no_other(case, frozen):
    got, wanted = run(lora_linear, case, frozen=frozen), run(by_delta, case, frozen=frozen)
    for index, (mine, theirs) in enumerate(zip(got[2], wanted[2], strict=True)):
        assert index not in frozen or mine is None
        assert_same(mine, theirs, **EXACT)
    assert_same(got[1], wanted[1], **EXACT)


@given(case=cases())
def test_an_input_that_needs_no_gradient_gets_none(case):
    got, wanted = run(lora_linear, case, x_grad=False), run(by_delta, case, x_grad=False)
    assert got[1] is None
    for mine, theirs in zip(got[2], wanted[2], strict=True):
        assert_same(mine, theirs, **EXACT)


@given(
    outsides=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    runs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=3),
    used=st.sets(st.integers(0, 2), min_size=1),
    x_grad=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layers_together_equal_each_alone(outsides, runs, used, x_grad, seed):
    """Pieces of the same rows in several layers share products; some layers have none; an output may go unused."""
    generator = torch.Generator().manual_seed(seed)
    bases = [layer(5, outside, number == 1, generator, torch.float64) for number, outside in enumerate(outsides)]
    pieces, factors = [], []
    for number, outside in enumerate(outsides):
        for start, stop in runs:
            if torch.rand(1, generator=generator) < 0.7:
                rank = int(torch.randint(1, 4, (1,), generator=generator))
                pieces.append(Piece(min(start, stop), max(start, stop), len(factors), 0.5 + number, number))
                factors += factor_pairs([rank], 5, outside, generator, torch.float64)
    x_TI = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    weights = [torch.randn(8, outside, generator=generator, dtype=torch.float64) for outside in outsides]

    def found(forward):
        x = x_TI.clone().requires_grad_(x_grad)
        pairs = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in factors]
        ys = forward(x, pairs)
        loss = sum((y * w).sum() for n, (y, w) in enumerate(zip(ys, weights, strict=True)) if n in used)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.backward()
        return [*ys, x.grad, *(factor.grad for pair in pairs for factor in pair)]

    def alone(x, pairs):
        return [
            lora_linear(x, base, [piece._replace(layer=0) for piece in pieces if piece.layer == number], pairs)
            for number, base in enumerate(bases)
        ]

    for mine, theirs in zip(found(lambda x, ps: lora_linears(x, bases, pieces, ps)), found(alone), strict=True):
        assert_same(mine, theirs, **EXACT)


@settings(max_examples=20)
@given(case=cases())
def test_the_formulas_pass_gradcheck(case):
    """Finite differences know nothing of either implementation."""
    tokens, inside, outside, ranks, pieces, bias, seed = case
    generator = torch.Generator().manual_seed(seed)
    base = layer(inside, outside, bias, generator, torch.float64)
    x_TI = torch.randn(tokens, inside, generator=generator, dtype=torch.float64, requires_grad=True)
    flat = [f.requires_grad_() for pair in factor_pairs(ranks, inside, outside, generator, torch.float64) for f in pair]

    def forward(x, *fs):
        return lora_linear(x, base, pieces, list(zip(fs[::2], fs[1::2], strict=True)))

    assert torch.autograd.gradcheck(forward, (x_TI, *flat), fast_mode=True)


def test_bfloat16_is_as_near_the_truth_as_the_oracle_in_bfloat16():
    """Truth: the same bfloat16 values in float64. Both roundings are random, so twice the other's error bounds ours."""
    case = (64, 96, 80, [8, 4], [Piece(0, 40, 0, 2.0), Piece(20, 64, 1, 0.5)], True, 3)
    rounded, plain = run(lora_linear, case, torch.bfloat16), run(by_delta, case, torch.bfloat16)

    def in_float64(x_TI, base, pieces, factors):
        wide = Dense(nn.Parameter(base.weight.double()), nn.Parameter(base.bias.double()))
        return by_delta(x_TI.double(), wide, pieces, [(a.double(), b.double()) for a, b in factors])

    truth = run(in_float64, case, torch.bfloat16)
    for mine, theirs, exact in zip(
        [rounded[0], rounded[1], *rounded[2]],
        [plain[0], plain[1], *plain[2]],
        [truth[0], truth[1], *truth[2]],
        strict=True,
    ):
        assert mine.dtype == torch.bfloat16
        error, bound = (mine.double() - exact.double()).norm(), (theirs.double() - exact.double()).norm()
        # A gradient is rounded to bfloat16 once more at its end on every side: half an ulp, 2⁻⁹ of its size.
        assert error <= 2 * bound + 2**-9 * exact.double().norm()


def test_float32_factors_meet_a_bfloat16_input_and_keep_float32_gradients():
    generator = torch.Generator().manual_seed(0)
    base = layer(6, 5, True, generator, torch.bfloat16)
    x_TI = torch.randn(7, 6, generator=generator).bfloat16().requires_grad_()
    a_RI, b_OR = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((2, 6), (5, 2)))
    y_TO = lora_linear(x_TI, base, [Piece(0, 7, 0, 1.0)], [(a_RI, b_OR)])
    y_TO.float().sum().backward()
    assert y_TO.dtype == x_TI.grad.dtype == torch.bfloat16
    assert a_RI.grad.dtype == b_OR.grad.dtype == torch.float32


def test_the_layer_writes_to_nothing_it_was_given():
    generator = torch.Generator().manual_seed(0)
    base = layer(6, 5, True, generator, torch.float32)
    x_TI = torch.randn(7, 6, generator=generator).requires_grad_()
    factors = [tuple(f.requires_grad_() for f in pair) for pair in factor_pairs([2], 6, 5, generator, torch.float32)]
    given_TO = torch.randn(7, 5, generator=generator)
    everything = [x_TI, base.weight, base.bias, *factors[0], given_TO]
    before = [tensor.detach().clone() for tensor in everything]
    lora_linear(x_TI, base, [Piece(1, 6, 0, 3.0)], factors).backward(given_TO)
    for tensor, kept in zip(everything, before, strict=True):
        assert torch.equal(tensor.detach(), kept)


def test_a_graph_can_be_run_backward_twice():
    case = (5, 4, 3, [2], [Piece(0, 5, 0, 1.5)], False, 1)
    generator = torch.Generator().manual_seed(1)
    base = layer(4, 3, False, generator, torch.float64)
    x_TI = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    factors = [tuple(f.requires_grad_() for f in pair) for pair in factor_pairs([2], 4, 3, generator, torch.float64)]
    loss = lora_linear(x_TI, base, case[4], factors).square().sum()
    first = torch.autograd.grad(loss, [x_TI, *factors[0]], retain_graph=True)
    second = torch.autograd.grad(loss, [x_TI, *factors[0]])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_runs_under_autocast(dtype):
    """transformers.Trainer with bf16=True, TRL's default, wraps every call in autocast."""
    generator = torch.Generator().manual_seed(0)
    base = layer(6, 5, True, generator, dtype)
    x_TI = torch.randn(7, 6, generator=generator).requires_grad_()
    factors = [tuple(f.requires_grad_() for f in pair) for pair in factor_pairs([2], 6, 5, generator, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y_TO = lora_linear(x_TI, base, [Piece(1, 6, 0, 3.0)], factors)
    y_TO.float().sum().backward()
    wanted_TO = by_delta(
        x_TI.detach(),
        Dense(nn.Parameter(base.weight.float()), nn.Parameter(base.bias.float())),
        [Piece(1, 6, 0, 3.0)],
        factors,
    )
    # Sums of 6 products, each factor rounded to 2⁻⁹: 2 % of the largest is ample, a lost update is off by 100 %.
    assert (y_TO.float() - wanted_TO).abs().max() < 0.02 * wanted_TO.abs().max()
    assert factors[0][0].grad.dtype == torch.float32 and factors[0][0].grad.isfinite().all()
