"""What other tasks' data makes layers read, so that a new A can start where it does not answer them: OSRM's start.

Legend: T tokens, R rank, I in, S width of the sketch, K directions.

However two updates' weights lie, they meet where one answers the other's inputs. OSRM (Zhang & Zhou 2025, arXiv
2505.22934) starts A in the eigenvectors of C = E[x xᵀ] with the smallest values, x being what a layer reads on the
other tasks' data. In those A is wholly determined, and reads next to nothing of its own task either. Here A is drawn
outside of the K strongest eigenvectors, a quarter of the width at most: in what they leave x has little, and A a random
place in all of it. C has I² numbers; kept is C Ω for S = 2K random orthonormal columns Ω (Halko et al. 2011, arXiv
0909.4061).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ModelError
from veneer.methods.lora import LoRA
from veneer.model.heard import hear, linear_layers
from veneer.model.progress import shown

HEARING = "reading data of earlier adapters"
STRONGEST, SHARE = 512, 4  # K at most, and at most I / SHARE
# Below this part of the strongest, what is summed in float32 is rounding: no directions of anything.
ROUNDING = 1e-5
ROOM = 2**30  # bytes of sketches at a time; what needs more is run again for the next layers

Task = Sequence[Any]  # its rows: objects with input_ids


def strongest(model: Any, tasks: Sequence[Task], room: Mapping[str, int], progress: bool = False) -> dict[str, Tensor]:
    """Path -> the directions (K, I) in which the base's inputs are strongest, all tasks counting the same; orthonormal
    rows, float64 on the CPU.

    room: path -> at most so many; layers that cannot be listened to have none. Raises ModelError where what a layer
    reads is not finite.
    """
    layers = linear_layers(model)
    found: dict[str, Tensor] = {}
    for paths in shown(_groups({path: layers[path].in_features for path in room if path in layers}), HEARING, progress):
        omegas = {width: _omega(width, model.device) for width in {layers[path].in_features for path in paths}}
        sketches = {path: _Sketch(omegas[layers[path].in_features]) for path in paths}
        for task in tasks:
            for sketch in sketches.values():
                sketch.share = 1 / sum(len(one.input_ids) for one in task)
            hear(model, sketches, None, task)
        for path in paths:
            if sketches[path].heard:
                found[path] = sketches[path].strongest(min(room[path], _most(layers[path].in_features)), path)
    return found


def answered(model: nn.Module, tasks: Sequence[Task], methods: Mapping[str, LoRA]) -> dict[str, Any]:
    """`share`: E‖A x‖² beside what random factors of that length would make of x, 1 where A is no worse and no better;
    the mean over `layers`, which can be listened to, and over tasks. Empty without any."""
    layers = linear_layers(model)
    found, heard = [], set()
    for task in tasks:
        meters = {path: _Meter(method.a_RI.detach()) for path, method in methods.items() if path in layers}
        hear(model, meters, None, task)
        heard |= {path for path, meter in meters.items() if meter.heard}
        found += [meter.share() for meter in meters.values() if meter.heard]
    return {"share": sum(found) / len(found), "layers": len(heard)} if found else {}


def _most(width: int) -> int:
    return min(STRONGEST, width // SHARE)


def _omega(width: int, device: torch.device) -> Tensor:
    draw = torch.randn(width, min(width, 2 * _most(width)), generator=torch.Generator().manual_seed(width))
    return torch.linalg.qr(draw)[0].to(device)


def _groups(widths: Mapping[str, int]) -> list[list[str]]:
    """The layers, as many at a time as ROOM has place for; one at least."""
    groups: list[list[str]] = []
    left = 0
    for path, width in widths.items():
        size = 4 * width * 2 * _most(width)
        if not groups or size > left:
            groups.append([])
            left = ROOM
        groups[-1].append(path)
        left -= size
    return groups


class _Sketch:
    """C Ω, summed."""

    def __init__(self, omega_IS: Tensor) -> None:
        self.omega_IS, self.sum_IS = omega_IS, torch.zeros_like(omega_IS)
        self.share, self.heard = 1.0, False

    def __call__(self, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        self.sum_IS += self.share * (x_TI.mT @ (x_TI @ self.omega_IS))
        self.heard = True

    def strongest(self, count: int, path: str) -> Tensor:
        """The strongest left singular vectors, as rows: from the Gram matrix, which float64 has the digits for."""
        sum_IS = self.sum_IS.double()
        if not sum_IS.isfinite().all():
            raise ModelError(f"{path}: what it is fed on --orthogonal-data is not finite in this base")
        squares_S, v_SS = torch.linalg.eigh(sum_IS.mT @ sum_IS)
        s_S, v_SS = squares_S.clamp_min(0).sqrt().flip(0), v_SS.flip(1)
        kept = min(count, int((s_S > ROUNDING * s_S[0]).sum())) if len(s_S) else 0
        return (sum_IS @ (v_SS[:, :kept] / s_S[:kept])).mT.cpu()


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
