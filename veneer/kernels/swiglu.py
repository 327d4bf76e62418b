"""SwiGLU (Shazeer 2020, arXiv 2002.05202) between layers with LoRA, whose thin products are added on the way.

Legend: T tokens, F width of the MLP, R rank.

On a GPU it is Triton's (`veneer.kernels.swiglu_triton`); here is what that is checked against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.kernels.triton_here import has_triton

MOST_RANK = 32  # beyond, a program's factors do not stay in registers
Pair = tuple[Tensor, Tensor]


def swiglu(g_TF: Tensor, u_TF: Tensor, zs: Pair, bs: Pair) -> Tensor:
    """h = silu(g + z_g B_g') · (u + z_u B_u'), (T, F) in g's dtype.

    zs: (T, R) of gate and up; bs: (F, R). Everything in one dtype; sums and functions run in float32.
    """
    if g_TF.is_cuda and has_triton():
        from veneer.kernels.swiglu_triton import swiglu as triton_version

        return triton_version(g_TF, u_TF, zs, bs)
    return swiglu_reference(g_TF, u_TF, zs, bs)


def swiglu_backward(
    dh_TF: Tensor, g_TF: Tensor, u_TF: Tensor, zs: Pair, dz_TR: Tensor, bs: Pair, a_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dg, du and once more h, (T, F), of dh + dz A, the gradient of h. dh's memory may be written to."""
    if g_TF.is_cuda and has_triton():
        from veneer.kernels.swiglu_triton import swiglu_backward as triton_version

        return triton_version(dh_TF, g_TF, u_TF, zs, dz_TR, bs, a_RF)
    return swiglu_backward_reference(dh_TF, g_TF, u_TF, zs, dz_TR, bs, a_RF)


def swiglu_reference(g_TF: Tensor, u_TF: Tensor, zs: Pair, bs: Pair) -> Tensor:
    """`swiglu` by single products."""
    g, u = _adapted(g_TF, u_TF, zs, bs)
    return (g * torch.sigmoid(g) * u).to(g_TF.dtype)


def swiglu_backward_reference(
    dh_TF: Tensor, g_TF: Tensor, u_TF: Tensor, zs: Pair, dz_TR: Tensor, bs: Pair, a_RF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`swiglu_backward` by single products."""
    g, u = _adapted(g_TF, u_TF, zs, bs)
    dh, s = dh_TF.float() + dz_TR.float() @ a_RF.float(), torch.sigmoid(g)
    dg, du, h = dh * u * s * (1 + g * (1 - s)), dh * g * s, g * s * u
    return dg.to(g_TF.dtype), du.to(g_TF.dtype), h.to(g_TF.dtype)


def _adapted(g_TF: Tensor, u_TF: Tensor, zs: Pair, bs: Pair) -> Pair:
    g, u = (y.float() + z.float() @ b.float().t() for y, z, b in zip((g_TF, u_TF), zs, bs, strict=True))
    return g, u
