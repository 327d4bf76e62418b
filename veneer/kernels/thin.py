"""The products of a gradient with thin matrices, which LoRA's backward asks of every output.

Legend: T tokens, O out, R rank, X and Y any sizes. The Triton version is in `veneer.kernels.thin_triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.triton_here import has_triton

LEAST = 1 << 24  # elements of g from which one read of it is worth the sums over its parts
MOST_RANK = 32  # at 64 the parts that are summed up are as many bytes as a second read of g


def thin_gradients(g_TO: Tensor, z_TR: Tensor, b_OR: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g B, (T, R) in g's dtype, and g' z, (O, R) in `dtype`: on a GPU in one read of g where it is large."""
    if _in_one_read(g_TO, b_OR):
        from veneer.kernels.thin_triton import thin_gradients as triton_version

        return triton_version(g_TO, z_TR, b_OR, dtype)
    # The thin side first is the faster order on the CPU; the other one comes out contiguous.
    return g_TO @ b_OR, summed_product(g_TO, z_TR, dtype) if g_TO.is_cuda else summed_product(z_TR, g_TO, dtype).t()


def summed_product(left_TX: Tensor, right_TY: Tensor, dtype: torch.dtype) -> Tensor:
    """left' right, (X, Y) in `dtype`: a sum over all tokens, on a GPU not rounded to the activations' dtype first."""
    if left_TX.is_cuda and dtype == torch.float32 != left_TX.dtype:
        return torch.mm(left_TX.t(), right_TY, out_dtype=dtype)
    return (left_TX.t() @ right_TY).to(dtype)


def _in_one_read(g_TO: Tensor, b_OR: Tensor) -> bool:
    large = g_TO.is_cuda and g_TO.itemsize == 2 and g_TO.numel() >= LEAST and b_OR.shape[1] <= MOST_RANK
    return large and g_TO.stride(1) == 1 and b_OR.is_contiguous() and has_triton()
