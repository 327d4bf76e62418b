"""A base that is too large for one GPU: every process holds a share of each decoder layer (FSDP2, `fully_shard`).

A layer is gathered just before it runs, forward and backward, and let go after. Adapters stay whole in every process
(`veneer.train.optim` owns them), and so do the embedding and the vocabulary head: they may be one tensor, and the loss
reads the head outside of any module's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from veneer.errors import ConfigError, ModelError
from veneer.model.layers import decoder_layers
from veneer.model.leaf import Slotted
from veneer.train.ranks import Ranks


def check_shardable(wanted: bool, ranks: Ranks) -> None:
    """Raises ConfigError where there is nobody to share the base with."""
    if wanted and ranks.world == 1:
        raise ConfigError(
            "--fsdp shares the base among the processes that torchrun starts, and this is one process; next: "
            "torchrun --nproc-per-node 2 -m veneer.cli train ... --fsdp, or leave it out"
        )


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Leaves each process its share of every decoder layer, and moves model and share to the process's device.

    Weights keep their dtypes: packed ones are bytes that no policy may round. Adapters must be attached already.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(f"--fsdp: {type(model).__name__} has no decoder layers that veneer knows; leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (ranks.world,))
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    whole = {parameter for parameter in model.parameters() if parameter not in inside} | _adapters(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)  # what the layers share: streams, order, hooks
    with torch.no_grad():
        for tensor in (*whole, *model.buffers()):
            tensor.data = tensor.data.to(device)


def _adapters(model: nn.Module) -> set[nn.Parameter]:
    leaves = [module for module in model.modules() if isinstance(module, Slotted)]
    return {parameter for leaf in leaves for parameter in leaf.slots.parameters()}


@contextmanager
def gathered(model: nn.Module, path: str) -> Iterator[None]:
    """While inside, the weights of the leaf at `path` are whole. All processes must come here together."""
    names = path.split(".")
    above = [model.get_submodule(".".join(names[:end])) for end in range(len(names) - 1, -1, -1)]
    holder = next((module for module in above if isinstance(module, FSDPModule)), None)
    if holder is None:
        yield
        return
    holder.unshard()
    try:
        yield
    finally:
        holder.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold shares of this model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
