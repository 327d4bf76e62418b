"""The settings of training for merging: which adapters a new one is kept apart from, and how."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.settings import Settings
from veneer.config.values import Folders


class OrthogonalToSettings(Settings):
    """O-LoRA's term (arXiv:2310.14152), and a start in what earlier adapters do not read."""

    group: ClassVar[str] = "Training for merging"

    orthogonal_to: Folders = Field(
        default=[],
        description="adapters of this base that the new one is to be merged with later: A learns to read other "
        "directions than they do",
    )
    orthogonal_lambda: float = Field(
        default=0.5,
        ge=0,
        description="of the term added to the loss: times the squared length of A within what they read; 0 = none",
    )
    orthogonal_start: bool = Field(default=True, description="A starts outside of what they read")

    @model_validator(mode="after")
    def _of_somebody(self) -> OrthogonalToSettings:
        fields = type(self).model_fields
        idle = [n for n in ("orthogonal_lambda", "orthogonal_start") if getattr(self, n) != fields[n].default]
        if idle and not self.orthogonal_to:
            told = {"names": " and ".join(f"`{name}`" for name in idle)}
            raise PydanticCustomError("nobody", "{names} without `orthogonal_to`, which names the adapters", told)
        return self
