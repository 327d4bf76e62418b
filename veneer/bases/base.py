"""The contract of a storage: one frozen linear weight W (O, I).

Legend: T tokens, I in, O out.

A base gives the two products that training needs, forward and backward, and never a gradient of its own:
the fused layers in `veneer.kernels` call both directly, so a storage decides how each is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from veneer.errors import ModelError

Self = TypeVar("Self", bound="Base")


class Base(nn.Module):
    """One frozen weight W (O, I) and its bias (O) or None."""

    storage: ClassVar[str]  # its name in BASES
    weight: nn.Parameter  # as stored: the shape and dtype are the storage's own
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    _norms: tuple[Any, Tensor] | None = None  # of the weight's state, see `row_norms`

    @classmethod
    def from_weight(cls: type[Self], weight_OI: Tensor, bias_O: Tensor | None = None) -> Self:
        """Stores a plain float weight, on its own device; raises ModelError where it cannot (see `check_weight`)."""
        raise NotImplementedError

    @classmethod
    def from_linear(cls: type[Self], linear: nn.Linear) -> Self:
        """Takes over the weight and bias of `linear`; where the storage is the linear's own, without a copy."""
        return cls.from_weight(linear.weight.detach(), linear.bias)

    @classmethod
    def empty(
        cls: type[Self],
        out_features: int,
        in_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Self:
        """Unset tensors of the right shapes and dtypes, for `load_state_dict`; on "meta" with assign=True."""
        raise NotImplementedError

    @property
    def adds(self) -> bool:
        """Whether a product that is added to a given tensor spares the pass that adding it afterwards would take."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """What W decodes to: the dtype of the weight that was stored; a cast of the model changes it."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as a plain (O, I) tensor, rounded once, to `dtype` or else to the base's own; not to be written to."""
        raise NotImplementedError

    def matmul(self, x_TI: Tensor, into: Tensor | None = None) -> Tensor:
        """x W', (T, O) in x's dtype; not differentiable, without bias. With `into`, added to it in place."""
        raise NotImplementedError

    @classmethod
    def matmuls(cls: type[Self], bases: Sequence[Self], x_TI: Tensor, intos: Sequence[Tensor | None]) -> list[Tensor]:
        """`matmul` of several layers of this storage that are fed the same x."""
        return [base.matmul(x_TI, into) for base, into in zip(bases, intos, strict=True)]

    def matmul_t(self, g_TO: Tensor, into: Tensor | None = None) -> Tensor:
        """g W, (T, I): the product of the backward pass. With `into`, added to it in place, and `into` comes back."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """W as a plain (O, I) tensor in float32, a copy."""
        return self.decode(torch.float32)

    def renew_norms(self) -> None:
        """Brings norms that were asked for up to date: compiled code takes them as they are."""
        if self._norms is not None:
            self.row_norms()

    def row_norms(self) -> Tensor:
        """Euclidean norm of every output row, (O) in float32; computed once, since W is frozen."""
        if torch.compiler.is_compiling() and self._norms is not None:
            return self._norms[1]
        state = (self.weight.data_ptr(), self.weight._version, self.weight.dtype, self.weight.device)
        if self._norms is None or self._norms[0] != state:
            self._norms = (state, torch.linalg.vector_norm(self.dense(), dim=-1))
        return self._norms[1].clone()

    def packed(self: Self, w_OI: Tensor) -> Self:
        """Another weight of the same shape in the same storage and dtype; this one is unchanged."""
        wanted = (self.out_features, self.in_features)
        if w_OI.shape != wanted:
            raise ValueError(f"packed: got {tuple(w_OI.shape)}, wanted {wanted}")
        return self.from_weight(w_OI.detach().to(self.device, self.dtype, copy=True), self.bias)

    def linear(self, x: Tensor) -> Tensor:
        """x W' + bias for x (..., I), differentiable in x."""
        y = FrozenProduct.apply(x.reshape(-1, self.in_features), self)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


class FrozenProduct(torch.autograd.Function):
    """x W' with the gradient for x alone: W is frozen, so nothing else is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, base: Base) -> Tensor:
        ctx.base = base
        return base.matmul(x_TI)

    @staticmethod
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Any, ...]:
        return (ctx.base.matmul_t(g_TO) if ctx.needs_input_grad[0] else None), None


def frozen(tensor: Tensor) -> nn.Parameter:
    """The same memory as a parameter that is never trained; a parameter is frozen and comes back itself."""
    if isinstance(tensor, nn.Parameter):
        return tensor.requires_grad_(False)
    return nn.Parameter(tensor.detach(), requires_grad=False)


def check_weight(storage: str, weight_OI: Tensor) -> None:
    """Raises ModelError unless the weight is a float matrix of at least one element, all of them finite."""
    if weight_OI.dim() != 2 or weight_OI.numel() == 0 or not weight_OI.is_floating_point():
        got = f"{weight_OI.dtype} {tuple(weight_OI.shape)}"
        raise ModelError(f"{storage}: got a weight {got}, wanted a float matrix (O, I) of at least one element")
    if not torch.stack(torch.aminmax(weight_OI.detach())).isfinite().all():
        raise ModelError(f"{storage}: the weight holds NaN or infinity; wanted finite values, check the checkpoint")
