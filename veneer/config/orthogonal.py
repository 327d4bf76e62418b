"""The settings of training for merging: which adapters a new one is kept apart from, and how."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.settings import Settings
from veneer.config.values import FilesInOrder, Folders


class OrthogonalToSettings(Settings):
    """O-LoRA's term (arXiv:2310.14152), and a start in what earlier adapters, or their data, do not use."""

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
    orthogonal_data: FilesInOrder = Field(
        default=[],
        description="what they were trained on, a file for each of them in their order: A also starts outside of what "
        "the base's layers are fed there (OSRM, arXiv:2505.22934)",
    )

    @model_validator(mode="after")
    def _of_somebody(self) -> OrthogonalToSettings:
        fields = type(self).model_fields
        idle = [name for name in fields if name != "orthogonal_to" and getattr(self, name) != fields[name].default]
        if idle and not self.orthogonal_to:
            told = {"names": " and ".join(f"`{name}`" for name in idle)}
            raise PydanticCustomError("nobody", "{names} without `orthogonal_to`, which names the adapters", told)
        return self

    @model_validator(mode="after")
    def _a_file_each(self) -> OrthogonalToSettings:
        if not self.orthogonal_data:
            return self
        if len(self.orthogonal_data) != len(self.orthogonal_to):
            told = {"files": len(self.orthogonal_data), "adapters": len(self.orthogonal_to)}
            reason = (
                "`orthogonal_data` names {files} files for {adapters} adapters; wanted one for each, in their order"
            )
            raise PydanticCustomError("a_file_each", reason, told)
        if not self.orthogonal_start:
            raise PydanticCustomError(
                "no_start", "`orthogonal_data` is for the start alone; leave it out, or `orthogonal_start` false"
            )
        return self
