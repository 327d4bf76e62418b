"""Weights of 8 bits with one scale a row: int8, and float8 (e4m3) for weights and activations.

Legend: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from veneer.kernels.triton_here import has_triton

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
LEAST = 1e-12  # of a row's largest magnitude, so that a row of zeros has a scale
TINY = 1e-36  # the same for int8: 127 / TINY is finite
AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}  # elements worked on at a time, so that what is held beside stays small


def quantise_rows_int8(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, I) in int8 and the largest magnitude of each row (O) in float32: w ≈ code · magnitude / 127."""
    codes_OI = torch.empty(w_OI.shape, dtype=torch.int8, device=w_OI.device)
    absmax_O = torch.empty(len(w_OI), dtype=torch.float32, device=w_OI.device)
    for rows in _pieces(w_OI):
        piece = w_OI[rows].float()
        absmax = piece.abs().amax(1)
        absmax_O[rows] = absmax
        codes_OI[rows] = (piece * (127.0 / absmax.clamp(min=TINY)).unsqueeze(1)).round_()
    return codes_OI, absmax_O


def quantise_rows_fp8_reference(x_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, I) in e4m3 and scales (O, 1) in float32: x ≈ code · scale, a row's largest magnitude is code 448.

    The cast itself would turn what exceeds 448 into NaN: values saturate before it. A row that holds NaN or infinity
    has NaN for its scale, so that its products are NaN and no other row's.
    """
    codes_OI = torch.empty(x_OI.shape, dtype=E4M3, device=x_OI.device)
    scale_O1 = torch.empty(len(x_OI), 1, dtype=torch.float32, device=x_OI.device)
    for rows in _pieces(x_OI):
        piece = x_OI[rows].float()
        absmax = piece.abs().amax(1, keepdim=True).clamp_(min=LEAST)
        scale_O1[rows] = torch.where(absmax.isfinite(), absmax * (1 / E4M3_MAX), torch.nan)
        codes_OI[rows] = (piece * (E4M3_MAX / absmax)).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes_OI, scale_O1


def dequantise_rows(codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """code · scale, (O, I): a float32 product rounded once, to `dtype`."""
    if codes_OI.is_cuda and not torch.compiler.is_compiling() and _in_triton(codes_OI):
        from veneer.kernels.rowwise_triton import dequantise_rows_triton

        return dequantise_rows_triton(codes_OI, scale_O, dtype)
    if torch.compiler.is_compiling() or codes_OI.device.type != "cpu":
        return (codes_OI.float() * scale_O.unsqueeze(1)).to(dtype)
    out_OI = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    for rows in _pieces(codes_OI):
        out_OI[rows] = _as_float(codes_OI[rows]).mul_(scale_O[rows].unsqueeze(1))
    return out_OI


def _in_triton(codes: Tensor) -> bool:
    """Whether a kernel of ours can read these codes: e4m3 from compute capability 8.9 on."""
    reads = codes.dtype != E4M3 or torch.cuda.get_device_capability(codes.device) >= (8, 9)
    return reads and has_triton()


def _as_float(codes: Tensor) -> Tensor:
    if codes.dtype != E4M3:
        return codes.float()
    # The cast takes four times as long on a CPU as looking each byte up.
    return torch.index_select(_e4m3_values(), 0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


@lru_cache(maxsize=1)
def _e4m3_values() -> Tensor:
    """The 256 values of e4m3, (256) float32."""
    return torch.arange(256, dtype=torch.uint8).view(E4M3).float()


def _pieces(w_OI: Tensor) -> Iterator[slice]:
    rows = max(1, AT_ONCE.get(w_OI.device.type, AT_ONCE["cpu"]) // max(1, w_OI.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(w_OI), rows))


def quantise_rows_fp8(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows_fp8_reference`, on CUDA as one Triton launch: x is read once."""
    return _quantise_op(x_TI) if x_TI.is_cuda else quantise_rows_fp8_reference(x_TI)


def _quantised(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    if not (x_TI.is_cuda and has_triton()):
        return quantise_rows_fp8_reference(x_TI)
    from veneer.kernels.rowwise_triton import quantise_rows_fp8_triton

    return quantise_rows_fp8_triton(x_TI)


_quantise_op = torch.library.custom_op(
    "veneer::quantise_rows_fp8", _quantised, mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)"
)


@_quantise_op.register_fake
def _shape_of_quantised(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    codes_TI = torch.empty(x_TI.shape, dtype=E4M3, device=x_TI.device)
    return codes_TI, torch.empty(len(x_TI), 1, dtype=torch.float32, device=x_TI.device)
