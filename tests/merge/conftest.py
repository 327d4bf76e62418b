"""A base model folder and an adapter on it, large enough to matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import pico_folder  # noqa: F401
from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.model.load import load


@pytest.fixture
def base(pico_folder: Path) -> Path:  # noqa: F811
    return pico_folder


@pytest.fixture
def adapter_folder(base: Path, tmp_path: Path) -> Path:
    """Rank 4 on every linear layer, update norm about a tenth of the weight's."""
    model = attach(load(str(base), "float32").model, LoraSettings(r=4), seed=1)
    plain = take(model, base_name=str(base))
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Any] = {
        name: value if name.endswith(".a") else 0.003 * torch.randn(value.shape, generator=generator)
        for name, value in plain.tensors.items()
    }
    Adapter(tensors, plain.card).save(tmp_path / "adapter")
    return tmp_path / "adapter"
