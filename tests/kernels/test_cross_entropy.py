"""Cross-entropy in place against float64; the Triton version in the interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.kernels.cross_entropy import cross_entropy_reference_

# nll: sums in float32. Gradient: exp(x - logsumexp) of numbers up to 40, which are known to 2e-6 (half a last place),
# and one rounding of a number up to 1 to the logits' dtype.
GRADIENT = {torch.float32: 2**-17, torch.bfloat16: 2**-8}


def check(version, rows: int, vocabulary: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, vocabulary + 3), torch.nan).to(dtype)  # a stride, and what a wrong column would read
    logits_MV = wide[:, :vocabulary]
    logits_MV.copy_(torch.randn(rows, vocabulary, generator=generator) * 8)
    tokens_M = torch.randint(vocabulary, (rows,), generator=generator)
    given = logits_MV.double()
    log_probs = given.log_softmax(-1)
    wanted_M = -log_probs.gather(1, tokens_M[:, None]).squeeze(1)
    torch.testing.assert_close(version(logits_MV, tokens_M, False).double(), wanted_M, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_MV.double(), given)  # not asked to write
    torch.testing.assert_close(version(logits_MV, tokens_M, True).double(), wanted_M, rtol=1e-5, atol=1e-5)
    onehot = torch.nn.functional.one_hot(tokens_M, vocabulary)
    assert ((logits_MV.double() - (log_probs.exp() - onehot)).abs() <= GRADIENT[dtype]).all()
    assert wide[:, vocabulary:].isnan().all()


@pytest.mark.parametrize("dtype", GRADIENT)
@given(rows=st.integers(0, 40), vocabulary=st.integers(1, 70), seed=st.integers(0, 99))
def test_the_reference_against_float64(dtype, rows, vocabulary, seed):
    check(cross_entropy_reference_, rows, vocabulary, dtype, seed)


INTERPRETED = """
import torch, triton.language as tl
from tests.kernels.test_cross_entropy import check
from veneer.kernels import cross_entropy_triton as kernel
tl.debug_barrier = lambda: None  # the interpreter runs a program's threads one after the other
kernel.BLOCK = 32
for dtype in (torch.float32, torch.bfloat16):
    for rows, vocabulary in ((0, 5), (1, 1), (3, 7), (2, 32), (5, 33), (4, 100), (3, 129)):
        check(kernel.cross_entropy_, rows, vocabulary, dtype, rows + vocabulary)
check_inf = torch.full((1, 70), -torch.inf); check_inf[0, 69] = 3.0
assert kernel.cross_entropy_(check_inf, torch.tensor([69]), True).item() == 0.0
assert (check_inf == 0).all()
print("checked")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "checked", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
@pytest.mark.parametrize("dtype", GRADIENT)
@pytest.mark.parametrize("rows, vocabulary", [(1, 1), (3, 127), (5, 8192), (7, 8193), (64, 49152), (33, 128256)])
def test_the_kernel_on_the_gpu(dtype, rows, vocabulary):
    from veneer.kernels.cross_entropy_triton import cross_entropy_

    def version(logits, tokens, wanted):
        moved = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="cuda").copy_(logits)
        nll_M = cross_entropy_(moved, tokens.cuda(), wanted)
        logits.copy_(moved)
        return nll_M.cpu()

    check(version, rows, vocabulary, dtype, 0)
