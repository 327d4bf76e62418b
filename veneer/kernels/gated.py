"""A gated MLP with LoRA on all three layers as one operation: y = down(silu(gate(x)) · up(x)).

Legend: T tokens, D hidden size, F width of the MLP, R rank.

The frozen products of gate and up are kept as they come, without their adapters, and nothing else that is F wide: h is
made once forward and once backward, where it is needed (`veneer.kernels.swiglu`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.lora import Cast, Piece, Products, matmuls, through_x
from veneer.kernels.swiglu import swiglu, swiglu_backward
from veneer.kernels.thin import summed_product, thin_gradients


class _Adapters:
    """Factors of gate, up and down (A and B of each) in the activations' dtype, and who speaks over the rows."""

    def __init__(self, factors: Sequence[Tensor], scales: Sequence[float], x_TD: Tensor) -> None:
        tokens = len(x_TD)
        self.first, self.last = Cast(factors[:4], x_TD.dtype), Cast(factors[4:], x_TD.dtype)
        self.run = [Piece(0, tokens, layer, scale, layer) for layer, scale in enumerate(scales[:2])]
        self.last_run = [Piece(0, tokens, 0, scales[2])]
        self.bs = (self.first.b[0], self.first.b[1])
        self.a_RF, self.b_DR = self.last.a[0], self.last.b[0]

    def apart(self, z_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Gate's part and up's."""
        z_g, z_u = self.first.split(z_TR, self.run, 1)
        return z_g, z_u


def gate_and_up(
    x_TD: Tensor, bases: Sequence[Products], factors: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """x W' of gate and of up (T, F), without their adapters, and z = s x A' of both (T, R)."""
    adapters = _Adapters(factors, scales, x_TD)
    z_TR = adapters.first.scaled(x_TD @ adapters.first.stacked(adapters.run).t(), adapters.run)
    g_TF, u_TF = matmuls(bases[:2], x_TD, [None, None])
    return g_TF, u_TF, z_TR


def down(
    x_TD: Tensor,
    g_TF: Tensor,
    u_TF: Tensor,
    z_TR: Tensor,
    base: Products,
    factors: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    """y (T, D) of what `gate_and_up` gives."""
    adapters = _Adapters(factors, scales, x_TD)
    h_TF = swiglu(g_TF, u_TF, adapters.apart(z_TR), adapters.bs)
    thin = adapters.last.scaled(h_TF @ adapters.a_RF.t(), adapters.last_run) @ adapters.b_DR.t()
    y_TD = base.matmul(h_TF, thin) if base.adds else base.matmul(h_TF).add_(thin)
    return y_TD if base.bias is None else y_TD + base.bias.to(y_TD.dtype)


def gated_gradients(
    dy_TD: Tensor,
    x_TD: Tensor,
    g_TF: Tensor,
    u_TF: Tensor,
    z_TR: Tensor,
    bases: Sequence[Products],
    factors: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of x (T, D), and those of the six factors in their dtypes."""
    adapters = _Adapters(factors, scales, x_TD)
    dtypes = [factor.dtype for factor in factors]
    dz_last = adapters.last.scaled(dy_TD @ adapters.b_DR, adapters.last_run)
    zs, dh_TF = adapters.apart(z_TR), bases[2].matmul_t(dy_TD)
    *outputs, h_TF = swiglu_backward(dh_TF, g_TF, u_TF, zs, dz_last, adapters.bs, adapters.a_RF)
    z_last, da_FR = thin_gradients(h_TF, dz_last, adapters.a_RF.t().contiguous(), dtypes[4])
    db_last = summed_product(dy_TD, adapters.last.scaled(z_last, adapters.last_run), dtypes[5])
    dz_g, db_g = thin_gradients(outputs[0], zs[0], adapters.bs[0], dtypes[1])
    dz_u, db_u = thin_gradients(outputs[1], zs[1], adapters.bs[1], dtypes[3])
    dz_TR = adapters.first.scaled(torch.cat([dz_g, dz_u], 1), adapters.run)
    da_g, da_u = adapters.first.split(summed_product(dz_TR, x_TD, dtypes[0]), adapters.run, 0)
    dx_TD = through_x(outputs, x_TD, [dz_TR], bases[:2], [adapters.run], adapters.first)
    assert dx_TD is not None
    return dx_TD, [da_g, db_g, da_u.to(dtypes[2]), db_u, da_FR.t(), db_last]
