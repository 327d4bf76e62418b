"""8-bit integers with one scale a row; with or without the columns that would ruin the scales.

Legend: I in, O out, C columns kept aside.

In a checkpoint as bitsandbytes writes it: `weight` (int8), `SCB` (float32, the largest magnitude of each row),
`weight_format` (0: row-major). The columns kept aside are `weight.outlier_columns` and `weight.outliers`.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from veneer.bases.base import check_weight, frozen
from veneer.bases.quantised import Quantised, unset
from veneer.kernels.rowwise import dequantise_rows, quantise_rows_int8

FORMAT = "weight_format"
RMS_TIMES = 6.0  # a weight is far out beyond this many times its row's root mean square
COLUMNS_AT_MOST = 1 / 128  # of all, rounded up: at 16 bits each, an eighth of a bit an element

Self = TypeVar("Self", bound="Int8")


class Int8(Quantised):
    """Symmetric codes (O, I) in -127 … 127 and the largest magnitude of each row (O): w = code · magnitude / 127."""

    storage = "int8"
    keys = {"absmax": "SCB"}

    @classmethod
    def from_weight(cls: type[Self], weight_OI: Tensor, bias_O: Tensor | None = None) -> Self:
        check_weight(cls.storage, weight_OI)
        made = cls(tuple(weight_OI.shape), weight_OI.dtype, bias_O)
        made._encode(weight_OI.detach())
        return made

    @classmethod
    def empty(
        cls: type[Self],
        out_features: int,
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Self:
        bias_O = unset(out_features, dtype=dtype, device=device) if bias else None
        made = cls((out_features, in_features), dtype, bias_O)
        made.weight = unset(out_features, in_features, dtype=torch.int8, device=device)
        made.absmax = unset(out_features, dtype=torch.float32, device=device)
        return made

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        return dequantise_rows(self.weight, self.absmax * (1 / 127), dtype or self.dtype)

    def extra_state(self) -> dict[str, Tensor]:
        return {FORMAT: torch.zeros((), dtype=torch.uint8, device=self.device)}

    def faults_of(self, state: dict[str, Tensor]) -> list[str]:
        layout = state.get(FORMAT)
        if layout is None or layout.is_meta or layout.item() == 0:
            return []
        return [f"{FORMAT}: got {layout.item()}, wanted 0, row-major; save it with a newer bitsandbytes"]

    def _encode(self, weight_OI: Tensor) -> None:
        codes_OI, absmax_O = quantise_rows_int8(weight_OI)
        self.weight, self.absmax = frozen(codes_OI), frozen(absmax_O)


class Int8Outlier(Int8):
    """Int8 that keeps the few input columns whose magnitude would ruin rows' scales in the weight's own dtype.

    The idea is that of LLM.int8() (2208.07339), there for activations, and of OWQ (2306.02272), there by a Hessian;
    here the choice is made once, from the weight alone: a column is kept if any of its weights exceeds
    6 · the root mean square of its row (of Gaussian weights two in a thousand million do), those with the largest sum
    of squared excess first, at most one column in 128, rounded up. Without such a column it is Int8.
    """

    storage = "int8-outlier"
    columns: nn.Parameter | None  # (C) int64, ascending
    outliers: nn.Parameter | None  # (O, C)
    keys = {"absmax": "SCB", "columns": "weight.outlier_columns", "outliers": "weight.outliers"}

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__(shape, dtype, bias)
        self.register_parameter("columns", None)
        self.register_parameter("outliers", None)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        w_OI = super().decode(dtype)
        if self.columns is None or self.outliers is None:
            return w_OI
        return w_OI.index_copy_(1, self.columns, self.outliers.to(w_OI.dtype))

    def _encode(self, weight_OI: Tensor) -> None:
        columns_C = outlier_columns(weight_OI)
        if len(columns_C):
            self.columns, self.outliers = frozen(columns_C), frozen(weight_OI[:, columns_C])
            weight_OI = weight_OI.index_fill(1, columns_C, 0)
        super()._encode(weight_OI)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """How many columns are kept is the checkpoint's to say."""
        columns = state_dict.get(prefix + self.keys["columns"])
        if prefix + "weight" in state_dict:
            device, kept = self.device, 0 if columns is None else columns.numel()
            self.columns = unset(kept, dtype=torch.int64, device=device) if kept else None
            outliers = state_dict.get(prefix + self.keys["outliers"], self.weight)
            dtype = outliers.dtype if outliers.is_floating_point() else self.dtype
            self.outliers = unset(self.out_features, kept, dtype=dtype, device=device) if kept else None
        super()._load_from_state_dict(state_dict, prefix, *rest)


def outlier_columns(weight_OI: Tensor) -> Tensor:
    """Indices (C), ascending, of the columns that `Int8Outlier` keeps aside."""
    score_I = torch.zeros(weight_OI.shape[1], device=weight_OI.device)
    for piece in weight_OI.split(max(1, (1 << 22) // weight_OI.shape[1])):
        magnitude = piece.float().abs()
        rms = torch.linalg.vector_norm(magnitude, dim=1, keepdim=True) / math.sqrt(weight_OI.shape[1])
        score_I += (magnitude / rms.clamp(min=1e-30) - RMS_TIMES).clamp_(min=0).square_().sum(0)
    at_most = math.ceil(len(score_I) * COLUMNS_AT_MOST)
    score, columns = score_I.topk(at_most)
    return columns[score > 0].sort().values
