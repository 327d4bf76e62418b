"""What the quantised storages share: products by decoding, packed tensors that no cast touches, names in a checkpoint.

Legend: T tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.bases.base import Base, frozen
from veneer.errors import ModelError, listed

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes an element -> dtype


class Quantised(Base):
    """A weight that is decoded to x's dtype for every product; a member encodes and decodes.

    Its packed tensors are frozen parameters, so that FSDP2 may split them, and keep their dtypes and bytes under
    `model.to(dtype)`, `half()` and the like. What follows such a cast is the bias and `dtype`, which is that of the
    decoded weight: after `model.bfloat16()` the layer acts as a plain bfloat16 layer of the same W would.
    """

    keys: ClassVar[dict[str, str]]  # parameter -> its key in a checkpoint, below the layer's name
    unsaved: ClassVar[tuple[str, ...]] = ()  # parameters that no checkpoint holds

    held: Tensor | None = None  # the decoded weight, for a while: see veneer.bases.kept
    holding = False  # whether the next decoded weight is to be held

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self._dtype = dtype
        self.bias = None if bias is None else frozen(bias)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def matmul(self, x_TI: Tensor, into: Tensor | None = None) -> Tensor:
        w_IO = self._weight_in(x_TI.dtype).t()
        if into is None:
            return torch.mm(x_TI, w_IO)
        return into.addmm_(x_TI, w_IO) if into.dtype == x_TI.dtype else into.add_(torch.mm(x_TI, w_IO))

    def matmul_t(self, g_TO: Tensor, into: Tensor | None = None) -> Tensor:
        w_OI = self._weight_in(g_TO.dtype)
        if into is None:
            return torch.mm(g_TO, w_OI)
        return into.addmm_(g_TO, w_OI) if into.dtype == g_TO.dtype else into.add_(torch.mm(g_TO, w_OI))

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        if self.held is not None and self.held.dtype == dtype:
            return self.held
        weight = self.decode(dtype)
        if self.holding:
            self.held = weight
        return weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"

    def extra_state(self) -> dict[str, Tensor]:
        """Keys and values that a checkpoint holds beside the parameters: constants, settings."""
        return {}

    def faults_of(self, state: dict[str, Tensor]) -> list[str]:
        """What is wrong with what a checkpoint holds for this layer; may bring `state` into this storage's form."""
        return []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantised:
        """Moves go through; casts reach the bias and `dtype` alone."""
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype
        return super()._apply(lambda tensor: fn(tensor) if tensor is self.bias else _moved(fn, tensor), recurse)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None and name not in self.unsaved:
                destination[prefix + self.keys.get(name, name)] = parameter if keep_vars else parameter.detach()
        destination.update({prefix + key: value for key, value in self.extra_state().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Raises ModelError, all faults at once, rather than load values that are not this storage's."""
        state = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        faults = self.faults_of(state) if "weight" in state else []
        held = {name: value for name, value in self._parameters.items() if value is not None}
        wanted = {self.keys.get(name, name): name for name in held if name not in self.unsaved}
        for key, name in wanted.items():
            if key in state:
                faults += [f"{key}: {fault}" for fault in _value_faults(state[key], held[name], name == "bias")]
        if faults:
            raise ModelError(listed(f"{prefix.rstrip('.') or 'layer'}: not a weight stored as {self.storage}", faults))
        missing_keys += [prefix + key for key in wanted if key not in state]
        known = {*wanted, *self.extra_state()}
        unexpected_keys += [prefix + key for key in state if key not in known]
        for key in wanted.keys() & state.keys():
            self._take(wanted[key], state[key], assign=bool(local_metadata.get("assign_to_params_buffers")))

    def _take(self, name: str, value: Tensor, assign: bool) -> None:
        if assign:
            setattr(self, name, frozen(value.detach()))
        else:
            with torch.no_grad():
                self._parameters[name].copy_(value)


def unset(*shape: int, dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    """A frozen parameter whose values are to be loaded."""
    return frozen(torch.empty(*shape, dtype=dtype, device=device))


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn without its cast: where it casts, it is shown integers of the same width, which casts of models leave be."""
    if fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype == tensor.dtype:
        return fn(tensor)
    bits = tensor.detach().view(INTEGERS[tensor.element_size()])
    moved = fn(bits)
    moved = moved if moved.dtype == bits.dtype else bits.to(moved.device)  # `type(dtype)` casts integers too
    return moved.view(tensor.dtype)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _value_faults(got: Tensor, held: Tensor, bias: bool) -> list[str]:
    """What is wrong with one tensor of a checkpoint; a bias may come in any float dtype, and be what it is."""
    if got.shape != held.shape or not (got.dtype == held.dtype or (bias and got.is_floating_point())):
        return [f"got {_kind(got)}, wanted {_kind(held)}"]
    checked = got.is_floating_point() and got.element_size() > 1 and not (bias or got.is_meta)
    return ["holds NaN or infinity"] if checked and not got.isfinite().all() else []
