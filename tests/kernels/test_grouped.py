"""Products of rows with the matrix of their group, against a loop over rows; torch's kernel where it is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.kernels.grouped import ends_of, grouped, grouped_pair, has_kernel

ROWS = st.lists(st.integers(0, 4), max_size=12)


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@settings(max_examples=40)
@given(
    experts=ROWS, inside=st.integers(1, 5), outside=st.integers(1, 5), rank=st.integers(1, 3), seed=st.integers(0, 9)
)
def test_each_row_meets_the_matrix_of_its_expert(experts, inside, outside, rank, seed):
    generator, expert_S = torch.Generator().manual_seed(seed), torch.tensor(sorted(experts), dtype=torch.int64)
    x_SI, w_EOI = random(generator, len(experts), inside), random(generator, 5, outside, inside)
    a_ERI, b_EOR = random(generator, 5, rank, inside), random(generator, 5, outside, rank)
    ends_E = ends_of(expert_S, 5)
    assert ends_E.tolist() == [sum(expert <= e for expert in experts) for e in range(5)]
    found = (grouped(x_SI, w_EOI, ends_E), grouped_pair(x_SI, a_ERI, b_EOR, ends_E))
    dense = [w_EOI, b_EOR @ a_ERI]
    wanted = tuple(torch.einsum("si,soi->so", x_SI, w[expert_S]) for w in dense)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)
    weights = torch.randn(len(experts), outside, generator=generator, dtype=torch.float64)
    given = (x_SI, w_EOI, a_ERI, b_EOR)
    gradients = [torch.autograd.grad(sum((y * weights).sum() for y in ys), given) for ys in (found, wanted)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_torchs_kernel_gives_the_same_in_half_precision(rank, transposed):
    generator = torch.Generator().manual_seed(0)
    expert_S = torch.tensor([0] * 5 + [2] * 3 + [3])
    x_SI, w_EOI, a_ERI, b_EOR = (
        torch.randn(*shape, generator=generator).bfloat16().requires_grad_()
        for shape in ((9, 16), (4, 24, 16), (4, rank, 16), (4, 24, rank))
    )
    w_EOI = w_EOI.mT.contiguous().mT if transposed else w_EOI
    assert has_kernel(x_SI, w_EOI) and not has_kernel(x_SI.float(), w_EOI) and not has_kernel(x_SI, a_ERI[:, :3])

    def run(x, w, a, b):
        y = grouped(x, w, ends_of(expert_S, 4)) + grouped_pair(x, a, b, ends_of(expert_S, 4))
        return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, 24)).sum(), (x, a, b))]

    found = run(x_SI, w_EOI, a_ERI, b_EOR)
    wanted = run(*(t.detach().double().requires_grad_() for t in (x_SI, w_EOI, a_ERI, b_EOR)))
    for got, want in zip(found, wanted, strict=True):
        # bfloat16 keeps 8 bits, and a thin product is rounded on the way.
        assert (got.double() - want).abs().max() < 0.03 * want.abs().max()
