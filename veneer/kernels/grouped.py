"""Products of rows with the matrix of their group: what a layer's experts compute, each of the tokens routed to it.

Legend: S rows, those of one expert together; E experts, I in, O out, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
LINE = 16  # bytes that the grouped kernel's rows are multiples of


def ends_of(expert_S: Tensor, experts: int) -> Tensor:
    """Where the rows of each expert end (E), int32, of expert numbers in ascending order; waits for no device."""
    return torch.searchsorted(expert_S, torch.arange(experts, device=expert_S.device), right=True, out_int32=True)


def grouped(x_SI: Tensor, w_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """x_s W_e' of every row (S, O), e its expert; differentiable in both. ends_E: see `ends_of`."""
    if has_kernel(x_SI, w_EOI):
        return F.grouped_mm(x_SI, w_EOI.mT, offs=ends_E)
    ends = [0, *ends_E.tolist()]
    pieces = [(ends[e], ends[e + 1], w_OI) for e, w_OI in enumerate(w_EOI.unbind(0)) if ends[e] < ends[e + 1]]
    return torch.cat([x_SI[:0] @ w_EOI[0].t(), *(x_SI[start:stop] @ w_OI.t() for start, stop, w_OI in pieces)])


def grouped_pair(x_SI: Tensor, a_ERI: Tensor, b_EOR: Tensor, ends_E: Tensor) -> Tensor:
    """x_s A_e' B_e' of every row (S, O), in x's dtype: B A is never formed."""
    a_ERI, b_EOR = a_ERI.to(x_SI.dtype), b_EOR.to(x_SI.dtype)
    missing = -a_ERI.shape[1] % (LINE // x_SI.element_size()) if x_SI.dtype in HALF else 0
    if missing:  # a rank that the kernel takes: zeros more
        a_ERI, b_EOR = F.pad(a_ERI, (0, 0, 0, missing)), F.pad(b_EOR, (0, missing))
    return grouped(grouped(x_SI, a_ERI, ends_E), b_EOR, ends_E)


def has_kernel(x_SI: Tensor, w_EOI: Tensor) -> bool:
    """Whether torch's grouped product takes these; it has one for half precision, and reads whole lines of 16 bytes."""
    if not (x_SI.dtype == w_EOI.dtype and x_SI.dtype in HALF):
        return False
    if x_SI.is_cuda and torch.cuda.get_device_capability(x_SI.device) < (8, 0):
        return False
    lines = [size * x_SI.element_size() % LINE for size in w_EOI.shape[1:]]
    return not any(lines) and all(tensor.data_ptr() % LINE == 0 for tensor in (x_SI, w_EOI))
