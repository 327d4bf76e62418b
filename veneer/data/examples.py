"""What training and evaluation see of a data file: token ids, the mask of trained tokens, and what was lost."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """Token ids of one row; `targets[i]` says that token i is trained on (predicted from the tokens before it)."""

    input_ids: tuple[int, ...]
    targets: tuple[bool, ...]
    row: int
    dropped: int  # tokens cut off by max_length

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the first trained token."""
        return self.input_ids[: self.targets.index(True)]


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

    def pick(self, units: Iterable[int]) -> tuple[Example, ...]:
        """The examples of some units, in their order."""
        return tuple(map(self.examples.__getitem__, units))

    def label(self, index: int) -> str:
        """What the preview calls an example."""
        return f"row {self.examples[index].row + 1}"
