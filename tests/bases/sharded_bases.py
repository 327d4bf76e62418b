"""One of two processes that hold every storage split by FSDP2; `test_sharded.py` starts both.

Arguments: rank, a file by which the two meet.
"""

from __future__ import annotations

import sys
from importlib import import_module

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from veneer.bases import BASES
from veneer.bases.base import Base


class Layer(nn.Module):
    """What is sharded: parameters are gathered around a module's forward."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base.linear(x).clone()


def run(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the input."""
    x_TI = torch.arange(140.0).view(2, 70).bfloat16().requires_grad_()
    y_TO = layer(x_TI)
    y_TO.sum().backward()
    return y_TO.detach(), x_TI.grad


def check(name: str) -> None:
    """The same output and gradient as unsharded, to the bit; odd sizes, so that the halves differ."""
    module, _, attribute = BASES[name].partition(":")
    w_OI = torch.randn(33, 70, generator=torch.Generator().manual_seed(0))
    w_OI[:, 5] *= 60  # an outlier column
    base = getattr(import_module(module), attribute).from_weight(w_OI.bfloat16(), torch.ones(33).bfloat16())
    layer = Layer(base)
    wanted = run(layer)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    assert all(torch.equal(*pair) for pair in zip(run(layer), wanted, strict=True)), name
    for key, value in base.named_parameters():
        assert len(value.to_local()) <= -(-len(value) // 2), f"{name}: {key} is whole on this process"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
    for each in BASES:
        check(each)
    dist.destroy_process_group()
