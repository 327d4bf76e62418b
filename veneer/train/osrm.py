"""What other tasks' data makes layers read, so that a new A can start where it does not answer them: OSRM's start.

Legend: T tokens, R rank, I in, S width of the sketch, K directions.

However two updates' weights lie, they meet where one answers the other's inputs. OSRM (Zhang & Zhou 2025, arXiv
2505.22934) starts A in the eigenvectors of C = E[x xᵀ] with the smallest values, x being what a layer reads on the
other tasks' data. C has I² numbers. Kept here is C Ω, for S random orthonormal columns Ω (Halko et al. 2011, arXiv
0909.4061; where I <= S that is all of C), and A is drawn outside of the K strongest directions: in what they leave, x
has little, and A keeps a random place in all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.methods.lora import LoRA
from veneer.model.heard import hear, linear_layers

SKETCH = 1024  # S
STRONGEST = 512  # K

Task = Sequence[Any]  # its rows: objects with input_ids


def strongest(model: nn.Module, tasks: Sequence[Task], room: Mapping[str, int]) -> dict[str, Tensor]:
    """Path -> the directions (K, I) in which the base's inputs are strongest, all tasks counting the same; orthonormal
    rows, float64 on the CPU.

    room: path -> at most so many; layers that cannot be listened to have none.
    """
    device = next(model.parameters()).device
    layers = linear_layers(model)
    sketches = {path: _Sketch(layers[path].in_features, device) for path in room if path in layers}
    for task in tasks:
        for sketch in sketches.values():
            sketch.share = 1 / sum(len(one.input_ids) for one in task)
        hear(model, sketches, None, task)
    return {path: sketch.strongest(min(room[path], STRONGEST)) for path, sketch in sketches.items() if sketch.heard}


def answered(model: nn.Module, tasks: Sequence[Task], methods: Mapping[str, LoRA]) -> float | None:
    """E‖A x‖² beside what random factors of that length would make of x: 1 where A is no worse and no better.

    The mean over layers that can be listened to, and over tasks; None without any.
    """
    layers = linear_layers(model)
    found = []
    for task in tasks:
        meters = {path: _Meter(method.a_RI.detach()) for path, method in methods.items() if path in layers}
        hear(model, meters, None, task)
        found += [meter.share() for meter in meters.values() if meter.heard]
    return sum(found) / len(found) if found else None


class _Sketch:
    """C Ω, summed."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        draw = torch.randn(inputs, min(inputs, SKETCH), generator=torch.Generator().manual_seed(inputs))
        self.omega_IS = torch.linalg.qr(draw)[0].to(device)
        self.sum_IS = torch.zeros_like(self.omega_IS)
        self.share, self.heard = 1.0, False

    def __call__(self, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        self.sum_IS += self.share * (x_TI.mT @ (x_TI @ self.omega_IS))
        self.heard = True

    def strongest(self, count: int) -> Tensor:
        """The strongest left singular vectors, as rows."""
        u_IS, s_S, _ = torch.linalg.svd(self.sum_IS.double(), full_matrices=False)
        return (u_IS[:, :count].mT * (s_S[:count, None] > 0)).cpu()


class _Meter:
    """‖A x‖² and ‖x‖², summed."""

    def __init__(self, a_RI: Tensor) -> None:
        self.a_RI = a_RI.float()
        self.sums_2 = torch.zeros(2, dtype=torch.float64, device=a_RI.device)
        self.heard = False

    def __call__(self, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        self.sums_2 += torch.stack([(x_TI @ self.a_RI.mT).square().sum(), x_TI.square().sum()])
        self.heard = True

    def share(self) -> float:
        out, fed = self.sums_2.tolist()
        return out * self.a_RI.shape[1] / (float(self.a_RI.double().square().sum()) * fed) if fed else 0.0
