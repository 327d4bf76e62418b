"""What training and evaluation see of a data file: token ids, the mask of trained tokens, and what was lost."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Example:
    """Token ids of one row; `targets[i]` says that token i is trained on (predicted from the tokens before it)."""

    input_ids: tuple[int, ...]
    targets: tuple[bool, ...]
    row: int
    dropped: int  # tokens cut off by max_length

    @property
    def sequences(self) -> tuple[Example, ...]:
        """What goes through the model."""
        return (self,)

    @property
    def terms(self) -> int:
        """What it counts in a loss: its trained tokens that have one before them."""
        return sum(self.targets[1:])

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the first trained token."""
        return self.input_ids[: self.targets.index(True)]


@dataclass(frozen=True)
class ExamplePair:
    """A chosen answer and a rejected one to the same prompt: trained on, split and drawn as one."""

    chosen: Example
    rejected: Example
    terms: ClassVar[int] = 1

    @property
    def sequences(self) -> tuple[Example, ...]:
        return (self.chosen, self.rejected)

    @property
    def row(self) -> int:
        return self.chosen.row

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Of both, one after the other."""
        return self.chosen.input_ids + self.rejected.input_ids

    @property
    def targets(self) -> tuple[bool, ...]:
        return self.chosen.targets + self.rejected.targets


Unit = Example | ExamplePair  # what is drawn, split and counted as one


@dataclass(frozen=True)
class EncodedRows:
    """Examples in row order, what was lost on the way, and notes that the user must be shown.

    A unit is what a split into training and validation moves as one: here a row, in a text a whole document.
    """

    examples: tuple[Example, ...]
    dropped_tokens: int
    rows_without_targets: tuple[int, ...]
    notes: tuple[str, ...]

    def groups(self) -> list[Hashable]:
        """One value for each unit; units of equal values belong on one side of a split."""
        return [example.prompt for example in self.examples]

    def pick(self, units: Iterable[int]) -> tuple[Any, ...]:
        """The examples of some units, in their order."""
        return tuple(map(self.examples.__getitem__, units))

    def label(self, index: int) -> str:
        """What the preview calls an example."""
        return f"row {self.examples[index].row + 1}"
