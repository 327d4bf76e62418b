"""MLPs of the form down(silu(gate(x)) · up(x)): one operation while a layer is compiled, where all three have adapters.

Legend: D hidden size, F width of the MLP.

Whether an MLP is of this form is not told by its name: its class's forward is run on stand-ins for its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.kernels.swiglu import MOST_RANK
from veneer.kernels.triton_here import has_triton
from veneer.methods.lora import LoRA
from veneer.model.leaf import Leaf
from veneer.model.traced import traced_mlp

LAYERS = ("gate_proj", "up_proj", "down_proj")


def is_gated(mlp: nn.Module) -> bool:
    """Whether the MLP's forward is down(silu(gate(x)) · up(x)), of leaves, and nothing else."""
    if not all(isinstance(getattr(mlp, name, None), Leaf) for name in LAYERS):
        return False
    functions = {name: child for name, child in mlp.named_children() if name not in LAYERS}
    if _watched(mlp):
        return False
    # Small and huge: what clamps anything, wherever, is another form.
    spread = torch.logspace(-3, 4, 6)
    given = [torch.cat([spread, -spread]).roll(number).view(1, 4, 3) for number in range(4)]
    x, gate, up, out = held = [tensor.clone() for tensor in given]
    wanted = F.silu(gate) * up
    asked: list[Tensor] = []

    def standing_in(value: Tensor) -> Callable[[Tensor], Tensor]:
        def layer(fed: Tensor) -> Tensor:
            asked.append(fed)
            return value

        return layer

    layers = {name: standing_in(value) for name, value in zip(LAYERS, (gate, up, out), strict=True)}
    plain = {name: value for name, value in vars(mlp).items() if not name.startswith("_")}
    stand_in = SimpleNamespace(**plain | functions | layers)
    before = dict(vars(stand_in))
    try:
        found = type(mlp).forward(stand_in, x)
    except Exception:  # it asks for more than these
        return False
    left_alone = vars(stand_in) == before and all(map(torch.equal, held, given))
    right = found is out and len(asked) == 3 and asked[0] is x is asked[1] and torch.equal(asked[2], wanted)
    return left_alone and right


def is_fused(device: torch.device) -> bool:
    """Whether there is a kernel for it: as fast as each layer on its own or faster, and less is kept for backward."""
    return device.type == "cuda" and has_triton()


def gated_or_own(mlp: Any, slot: str | None, x: Tensor) -> Tensor:
    """The forward of a gated MLP: as one operation while it is compiled and one `slot` speaks over all rows, by its
    class's own code otherwise."""
    leaves = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if torch.compiler.is_compiling() and slot is not None and all(_fits(leaf, slot) for leaf in leaves):
        bare = leaves[0].bias is None and leaves[1].bias is None
        if bare and not _watched(mlp) and (not x.is_cuda or x.itemsize == 2):
            return traced_mlp(leaves, slot, x)
    return type(mlp).forward(mlp, x)


def _fits(leaf: Leaf, slot: str) -> bool:
    if slot not in leaf.slots:
        return False
    method = leaf.slots[slot]
    return isinstance(method, LoRA) and method.rank <= MOST_RANK


def _watched(mlp: nn.Module) -> bool:
    """Whether someone is to see, or has changed, what passes between the layers."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any("forward" in vars(child) or any(getattr(child, kind) for kind in kinds) for child in mlp.children())
