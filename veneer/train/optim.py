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

Groups = list[dict[str, Any]]  # torch's parameter groups; `ratio`: of the rate


class FlatParameters:
    """The parameters given become views of `values_P`, their gradients views of `grads_P`.

    first: how many of them, from the first on, learn at the rate; the others learn at `ratio` times it (LoRA+, Hayou et
    al. 2024, arXiv 2402.12354: A first, then B). None: all at the same.
    """

    grads_P: Tensor

    def __init__(self, parameters: Sequence[nn.Parameter], first: int | None = None) -> None:
        self.first = None if first is None else sum(parameter.numel() for parameter in parameters[:first])
        total = sum(parameter.numel() for parameter in parameters)
        self.values_P = nn.Parameter(torch.empty(total, dtype=torch.float32, device=parameters[0].device))
        for parameter, piece in zip(parameters, _split(self.values_P.data, parameters), strict=True):
            parameter.data = piece.copy_(parameter.data)
        self.hold_gradients(parameters)

    def hold_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes the gradients, zero."""
        self.grads_P = torch.zeros_like(self.values_P.data)
        self.values_P.grad = self.grads_P
        for parameter, piece in zip(parameters, _split(self.grads_P, parameters), strict=True):
            parameter.grad = piece

    def __len__(self) -> int:
        return self.values_P.numel()

    @property
    def optimised(self) -> list[nn.Parameter]:
        """What an optimiser is to be over; where there are two, the second learns at another rate."""
        if self.first is None:
            return [self.values_P]
        halves = [nn.Parameter(half) for half in self.values_P.data.tensor_split([self.first])]
        for half, grad in zip(halves, self.grads_P.tensor_split([self.first]), strict=True):
            half.grad = grad
        return halves

    def clip(self, max_norm: float) -> Tensor:
        """The gradient's norm before clipping, a scalar tensor; 0 never clips."""
        norm = torch.linalg.vector_norm(self.grads_P)
        if max_norm > 0:
            self.grads_P.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, optimizer: Optimizer, finite: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clips, and updates where `finite` and the gradient are; returns its norm, and whether both are."""
        norm = self.clip(max_norm)
        finite = finite & torch.isfinite(norm)
        step_where(optimizer, finite)
        return norm, finite

    def clear(self) -> None:
        """Lets the next gradients begin at zero."""
        self.grads_P.zero_()


def _split(flat_P: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = flat_P.split([parameter.numel() for parameter in parameters])
    return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]


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


def first_last(methods: Mapping[str, Method]) -> tuple[list[nn.Parameter], int]:
    """The parameters of methods (by path), every A before all that is no A; how many A there are."""
    own = {path: list(method.parameters()) for path, method in methods.items()}
    ordered = by_family(methods)
    first = {id(parameters[0]) for parameters in own.values()}
    return sorted(ordered, key=lambda parameter: id(parameter) not in first), len(first)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Of the coming step: each group's share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("ratio", 1.0)


def adamw(groups: Groups, settings: TrainSettings) -> Optimizer:
    """torch's fused AdamW (Loshchilov & Hutter, arXiv 1711.05101); the rate is set each step."""
    return torch.optim.AdamW(groups, **_options(settings), fused=True)


def adamw_8bit(groups: Groups, settings: TrainSettings) -> Optimizer:
    """AdamW with moments in 8 bits, each block of 256 with a scale of its own (Dettmers et al., arXiv 2110.02861).

    An adapter under 4,096 parameters keeps its moments in 32 bits.
    """
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, **_options(settings))


def paged_adamw(groups: Groups, settings: TrainSettings) -> Optimizer:
    """AdamW with moments in memory that CUDA moves to the host and back as it needs to."""
    from bitsandbytes.optim.adamw import PagedAdamW32bit

    return PagedAdamW32bit(groups, **_options(settings))


def paged_adamw_8bit(groups: Groups, settings: TrainSettings) -> Optimizer:
    """Both: moments in 8 bits, in paged memory."""
    from bitsandbytes.optim.adamw import PagedAdamW8bit

    return PagedAdamW8bit(groups, **_options(settings))


# name -> function; the names are the values of the option `optim`
OPTIMIZERS: dict[str, Callable[[Groups, TrainSettings], Optimizer]] = {
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
    return OPTIMIZERS[settings.optim](_groups(flat, settings), settings)


def _groups(flat: FlatParameters, settings: TrainSettings) -> list[dict[str, Any]]:
    """What is optimised, in groups of one rate each."""
    if flat.first is None:
        return [{"params": flat.optimised}]
    first, last = flat.optimised
    return [{"params": [first]}, {"params": [last], "ratio": settings.loraplus_lr_ratio}]


def step_where(optimizer: Optimizer, finite: Tensor) -> None:
    """One step where `finite`, a scalar bool tensor, is true. AdamW of torch looks at it on the device; for others it
    is waited for."""
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = (~finite).float()  # as torch.amp.GradScaler tells it
        optimizer.step()
    elif bool(finite):
        optimizer.step()


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimiser remembers: tensors, and plain numbers. Empty before its first step. Where it is over several
    parameters, names begin with the parameter's number."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    memory: set[int] = set()
    for mark, parameter in _marked(optimizer):
        for name, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                numbers[mark + name] = value
                continue
            # bitsandbytes' parameters share tables, which a file of tensors may not.
            tensors[mark + name] = value.clone() if value.data_ptr() in memory else value
            memory.add(value.data_ptr())
    return tensors, numbers


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`. Parameters are to be restored after it.

    A step of rate 0 makes the state, wherever its kind of optimiser keeps it (paged memory, say); then it is filled.
    Nothing is done where nothing was remembered: every step until then was skipped.
    """
    if not tensors and not numbers:
        return
    set_rate(optimizer, 0.0)
    held = [parameter.grad for _, parameter in _marked(optimizer)]
    for _, parameter in _marked(optimizer):
        parameter.grad = None  # only those that have one are stepped
    for (mark, parameter), grad in zip(_marked(optimizer), held, strict=True):
        parameter.grad = torch.zeros_like(parameter) if grad is None else grad.zero_()
        optimizer.step()
        parameter.grad = None
        state = optimizer.state[parameter]
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.copy_(tensors[mark + name])
            elif mark + name in numbers:
                state[name] = numbers[mark + name]
    for (_, parameter), grad in zip(_marked(optimizer), held, strict=True):
        parameter.grad = grad


def _marked(optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [(f"{number}." if len(parameters) > 1 else "", each) for number, each in enumerate(parameters)]


def _options(settings: TrainSettings) -> dict[str, Any]:
    betas = (settings.adam_beta1, settings.adam_beta2)
    return {"lr": 0.0, "betas": betas, "eps": settings.adam_epsilon, "weight_decay": settings.weight_decay}
