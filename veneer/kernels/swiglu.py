"""SwiGLU (Shazeer 2020, arXiv 2002.05202) with what LoRA adds before and after it: one pass over what is MLP-wide.

Legend: T tokens, F width of the MLP, R rank.

On a GPU it is Triton's (`veneer.kernels.swiglu_triton`); here is what that is checked against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.triton_here import has_triton

MOST_RANK = 32  # beyond, what is kept of sums would not stay in registers
Pair = tuple[Tensor, Tensor]


class SwigluGradients(NamedTuple):
    """Gradients of `swiglu`, and what adapters ask of them; sums in float32."""

    outputs: Pair  # dg, du (T, F)
    dzs: Pair  # dg B_g, du B_u (T, R)
    dbs: Pair  # dg' z_g, du' z_u (F, R)
    da: Tensor  # dz' h (R, F)
    z: Tensor  # h A' (T, R): once more, so that nobody need keep it


def swiglu(g_TF: Tensor, u_TF: Tensor, zs: Pair, bs: Pair, a_RF: Tensor) -> Pair:
    """h = silu(g + z_g B_g') · (u + z_u B_u'), (T, F) in g's dtype, and h A', (T, R) in float32.

    zs: (T, R) of gate and up; bs: (F, R). Everything in one dtype; sums and functions run in float32.
    """
    if g_TF.is_cuda and has_triton():
        from veneer.kernels.swiglu_triton import swiglu as triton_version

        return triton_version(g_TF, u_TF, zs, bs, a_RF)
    return swiglu_reference(g_TF, u_TF, zs, bs, a_RF)


def swiglu_backward(
    dh_TF: Tensor, g_TF: Tensor, u_TF: Tensor, zs: Pair, dz_TR: Tensor, bs: Pair, a_RF: Tensor
) -> SwigluGradients:
    """Of dh + dz A, the gradient of h; dh's memory may be written to. The rest as of `swiglu`."""
    if g_TF.is_cuda and has_triton():
        from veneer.kernels.swiglu_triton import swiglu_backward as triton_version

        return triton_version(dh_TF, g_TF, u_TF, zs, dz_TR, bs, a_RF)
    return swiglu_backward_reference(dh_TF, g_TF, u_TF, zs, dz_TR, bs, a_RF)


def swiglu_reference(g_TF: Tensor, u_TF: Tensor, zs: Pair, bs: Pair, a_RF: Tensor) -> Pair:
    """`swiglu` by single products."""
    g, u = _adapted(g_TF, u_TF, zs, bs)
    h_TF = (g * torch.sigmoid(g) * u).to(g_TF.dtype)
    return h_TF, h_TF.float() @ a_RF.float().t()


def swiglu_backward_reference(
    dh_TF: Tensor, g_TF: Tensor, u_TF: Tensor, zs: Pair, dz_TR: Tensor, bs: Pair, a_RF: Tensor
) -> SwigluGradients:
    """`swiglu_backward` by single products."""
    g, u = _adapted(g_TF, u_TF, zs, bs)
    dh, s = dh_TF.float() + dz_TR.float() @ a_RF.float(), torch.sigmoid(g)
    h, du = ((g * s * u).to(g_TF.dtype).float(), (dh * g * s).to(g_TF.dtype))
    dg = (dh * u * s * (1 + g * (1 - s))).to(g_TF.dtype)
    dzs = (dg.float() @ bs[0].float(), du.float() @ bs[1].float())
    dbs = (dg.float().t() @ zs[0].float(), du.float().t() @ zs[1].float())
    return SwigluGradients((dg, du), dzs, dbs, dz_TR.float().t() @ h, h @ a_RF.float().t())


def _adapted(g_TF: Tensor, u_TF: Tensor, zs: Pair, bs: Pair) -> Pair:
    g, u = (y.float() + z.float() @ b.float().t() for y, z, b in zip((g_TF, u_TF), zs, bs, strict=True))
    return g, u
