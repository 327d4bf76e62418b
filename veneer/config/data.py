"""The settings of data: which files, what their columns are called, how long a row may be."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from veneer.config.settings import Settings
from veneer.config.values import MAX_LENGTH, Columns, Counts, File, Files, Length, RowsOrFraction, Shares, Text


class ColumnSettings(Settings):
    """How the columns of a data set are called."""

    group: ClassVar[str] = "Data"

    columns: Columns = Field(default={}, description="what your columns are called: prompt=Question,completion=Answer")


class RowSettings(ColumnSettings):
    """How the rows of data files are read where adapters are compared on them."""

    max_length: Length | None = Field(
        default=None,
        description="longest row in tokens, what is beyond is cut and counted; default: as the adapters were trained, "
        f"{MAX_LENGTH} where that is not known",
    )


class DataSettings(ColumnSettings):
    """What is trained on, and what is kept back to check it."""

    group: ClassVar[str] = "Data"

    dataset: Files = Field(
        description="training rows: .jsonl, .json, .csv, .tsv, .parquet, .txt, or hub:ORG/NAME:SPLIT; with prompt and "
        "completion, messages, or text; several are trained on together"
    )
    dataset_weights: Shares = Field(
        default=[], description="of several data sets: what share of the rows each is; default: all rows, once"
    )
    limit: Counts = Field(
        default=[], description="only the first N rows of each data set; or a number for each, or none"
    )
    eval_dataset: File | None = Field(default=None, description="validation rows in a file of their own")
    validation_split: RowsOrFraction = Field(
        default=0.05,
        description="without eval_dataset: rows kept back for validation, a fraction below 1 or a number; 0 = none",
    )
    max_length: Length = Field(
        default=MAX_LENGTH, description="longest row in tokens; what is beyond is cut and counted"
    )
    system_prompt: Text | None = Field(default=None, description="put before every conversation that has none")
    template: Literal["chat"] = Field(
        default="chat", description="how a row becomes text: the model's own chat template"
    )

    @property
    def datasets(self) -> list[str]:
        """The data sets to train on."""
        return [self.dataset] if isinstance(self.dataset, str) else self.dataset

    @property
    def limits(self) -> list[int | None]:
        """For each data set, how many of its rows are read at most."""
        return self.limit * len(self.datasets) if len(self.limit) == 1 else self.limit or [None] * len(self.datasets)

    @model_validator(mode="after")
    def _one_for_each(self) -> DataSettings:
        count, faults = len(self.datasets), []
        if self.dataset_weights and len(self.dataset_weights) != count:
            faults.append(f"`dataset_weights` has {len(self.dataset_weights)}")
        if len(self.limit) not in (0, 1, count):
            faults.append(f"`limit` has {len(self.limit)}")
        if faults:
            reason = {"faults": " and ".join(faults), "count": count}
            raise PydanticCustomError("count", "{faults} for {count} data sets; wanted one for each", reason)
        return self

    @property
    def has_validation(self) -> bool:
        """Whether any row is kept for validation."""
        return self.eval_dataset is not None or self.validation_split > 0
