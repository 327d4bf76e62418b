"""What `save_pretrained` writes of a quantised model: NF4 in the layout of bitsandbytes; other storages refuse.

The way back too: a quantised model made dense, which is then saved as any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.bases.dense import Dense
from veneer.errors import ModelError
from veneer.model import bnb
from veneer.model.leaf import Leaf
from veneer.model.read import forget_quantiser
from veneer.model.skeleton import Skeleton, SkeletonConfig


class Unsavable(Skeleton):
    """What transformers asks before it writes: no."""

    def __init__(self, storage: str) -> None:
        super().__init__(SkeletonConfig())
        self.storage = storage

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        raise ModelError(
            f"no file format holds a model stored as {self.storage}. Next: save the adapter (veneer.take), merge it "
            "into the dense base (veneer merge --into-base), or load the base as nf4, which bitsandbytes reads"
        )


def saves_as(model: PreTrainedModel, storage: str, dtype: torch.dtype) -> None:
    """Prepares `model.save_pretrained` of a model whose linear layers are held in `storage`."""
    if storage not in bnb.NF4.values():
        model.hf_quantizer = Unsavable(storage)
        return
    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.config.quantization_config = bnb.quantization_config(storage, dtype, dense)


def make_dense(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Decodes every quantised leaf to a dense one of the same values, rounded once to dtype; returns how many."""
    leaves = [m for m in model.modules() if isinstance(m, Leaf) and m.base.storage != "dense"]
    for leaf in leaves:
        bias = leaf.base.bias
        leaf.base = Dense.from_weight(leaf.base.decode(dtype), None if bias is None else bias.to(dtype))
    forget_quantiser(model)
    return len(leaves)
