"""One flat buffer for all factors of an adapter, and the optimisers over it: the table OPTIMIZERS.

Legend: P parameters of the adapter.

420 small tensors would be 420 small updates and norms; flat, each is one. A gradient all-reduce is one too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.config import TrainSettings
from veneer.errors import ConfigError
from veneer.methods.base import Method
from veneer.model.siblings import family


class FlatParameters:
    """The parameters given become views of `values_P`, their gradients views of `grads_P`."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        first = parameters[0]
        total = sum(parameter.numel() for parameter in parameters)
        self.values_P = nn.Parameter(torch.empty(total, dtype=torch.float32, device=first.device))
        self.grads_P = torch.zeros(total, dtype=torch.float32, device=first.device)
        self.values_P.grad = self.grads_P
        start = 0
        for parameter in parameters:
            stop = start + parameter.numel()
            self.values_P.data[start:stop].copy_(parameter.data.reshape(-1))
            parameter.data = self.values_P.data[start:stop].view_as(parameter)
            parameter.grad = self.grads_P[start:stop].view_as(parameter)
            start = stop

    def __len__(self) -> int:
        return self.values_P.numel()

    def clip(self, max_norm: float) -> Tensor:
        """The gradient's norm before clipping, a scalar tensor; 0 never clips."""
        norm = torch.linalg.vector_norm(self.grads_P)
        if max_norm > 0:
            self.grads_P.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def by_family(methods: Mapping[str, Method]) -> list[nn.Parameter]:
    """The parameters of methods (by path): of layers that are fed the same x first those that come first, every A, then
    those that come second, every B. As neighbours in memory they are cast, and multiplied, as one
    (`veneer.kernels.lora`)."""
    families: dict[str, list[list[nn.Parameter]]] = {}
    for path, method in methods.items():
        families.setdefault(family(path), []).append(list(method.parameters()))
    ordered: list[nn.Parameter] = []
    for members in families.values():
        for place in range(max(map(len, members))):
            ordered += [member[place] for member in members if place < len(member)]
    return ordered


def adamw(flat: FlatParameters, settings: TrainSettings) -> Optimizer:
    """torch's fused AdamW (Loshchilov & Hutter, arXiv 1711.05101) over the flat tensor; the rate is set each step."""
    return torch.optim.AdamW([flat.values_P], **_options(settings), fused=True)


def adamw_8bit(flat: FlatParameters, settings: TrainSettings) -> Optimizer:
    """AdamW with moments in 8 bits, each block of 256 with a scale of its own (Dettmers et al., arXiv 2110.02861).

    An adapter under 4,096 parameters keeps its moments in 32 bits.
    """
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit([flat.values_P], **_options(settings))


def paged_adamw(flat: FlatParameters, settings: TrainSettings) -> Optimizer:
    """AdamW with moments in memory that CUDA moves to the host and back as it needs to."""
    from bitsandbytes.optim.adamw import PagedAdamW32bit

    return PagedAdamW32bit([flat.values_P], **_options(settings))


def paged_adamw_8bit(flat: FlatParameters, settings: TrainSettings) -> Optimizer:
    """Both: moments in 8 bits, in paged memory."""
    from bitsandbytes.optim.adamw import PagedAdamW8bit

    return PagedAdamW8bit([flat.values_P], **_options(settings))


# name -> function; the names are the values of the option `optim`
OPTIMIZERS: dict[str, Callable[[FlatParameters, TrainSettings], Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "paged_adamw": paged_adamw,
    "paged_adamw_8bit": paged_adamw_8bit,
}


def check_optimizer(name: str) -> None:
    """Raises ConfigError where this machine lacks what the optimiser needs."""
    if name != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"--optim {name} comes from bitsandbytes, which is not installed; next: pip install bitsandbytes, or "
            "--optim adamw (the moments of an adapter are small: 8 bytes a trained parameter)"
        )
    if name.startswith("paged") and not torch.cuda.is_available():
        unpaged = name.removeprefix("paged_")
        raise ConfigError(f"--optim {name} pages memory of a CUDA GPU, and torch sees none; next: --optim {unpaged}")


def start_optimizer(flat: FlatParameters, settings: TrainSettings) -> Optimizer:
    """The optimiser that the settings name, at its start. Raises ConfigError as `check_optimizer`."""
    check_optimizer(settings.optim)
    return OPTIMIZERS[settings.optim](flat, settings)


def step_where(optimizer: Optimizer, finite: Tensor) -> None:
    """One step where `finite`, a scalar bool tensor, is true. AdamW of torch looks at it on the device; for others it
    is waited for."""
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = (~finite).float()  # as torch.amp.GradScaler tells it
        optimizer.step()
    elif bool(finite):
        optimizer.step()


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimiser over one flat tensor remembers: tensors, and plain numbers. Empty before its first step."""
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`. Parameters are to be restored after it.

    A step of rate 0 makes the state, wherever its kind of optimiser keeps it (paged memory, say); then it is filled.
    """
    group = optimizer.param_groups[0]
    [parameter] = group["params"]
    group["lr"] = 0.0
    parameter.grad.zero_()
    optimizer.step()
    state = optimizer.state[parameter]
    for name, value in state.items():
        if isinstance(value, Tensor):
            value.copy_(tensors[name])
    state.update(numbers)


def _options(settings: TrainSettings) -> dict[str, Any]:
    betas = (settings.adam_beta1, settings.adam_beta2)
    return {"lr": 0.0, "betas": betas, "eps": settings.adam_epsilon, "weight_decay": settings.weight_decay}
