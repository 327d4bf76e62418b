"""A model as transformers loads it, but for its linear layers, whose weights are never read.

transformers does what it knows best (the family's code, renamed keys, tied embeddings, buffers that no file holds);
where a linear layer stood, a `Hollow` waits for a weight. The hook for this is its plug-in for quantisers, of which
only the step "the model is made, nothing is loaded yet" is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from veneer.model.swap import linear_paths, place

METHOD = "veneer"


class Hollow(nn.Module):
    """Where a linear layer stood: its shape (O, I), no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape = (linear.out_features, linear.in_features)
        self.biased = linear.bias is not None


class SkeletonConfig(QuantizationConfigMixin):
    """What transformers asks for to call `Skeleton`."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = METHOD


class Skeleton(HfQuantizer):
    """Takes the linear layers out of a model that was just made, and notes which files it is loaded from."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False
        self.files: list[Path] = []

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        self.files = [Path(file) for file in checkpoint_files or ()]
        for path in linear_paths(model):
            linear = model.get_submodule(path)
            if type(linear) is nn.Linear:  # a family's own kind keeps its own arithmetic
                place(model, path, Hollow(linear))

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def skeleton_config() -> SkeletonConfig:
    """To be given to `from_pretrained` as `quantization_config`; registers the plug-in at the first call."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(SkeletonConfig)
        register_quantizer(METHOD)(Skeleton)
    return SkeletonConfig()


def hollows(model: nn.Module) -> dict[str, Hollow]:
    """Path -> what waits for a weight there, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Hollow)}
