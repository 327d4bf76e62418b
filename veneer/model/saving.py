"""What `save_pretrained` writes of a quantised model: NF4 in the layout of bitsandbytes; other storages refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.errors import ModelError
from veneer.model import bnb
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
