"""The data files of a merge, one for each parent: rows that a method may read, and rows that judge what it made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.config import MergeSettings
from veneer.data.files import Row
from veneer.data.preference import refuse_pairs
from veneer.data.sources import read_several, read_source
from veneer.errors import DataError
from veneer.merge.pinned import Named, named


@dataclass(frozen=True)
class ParentRows:
    """Of one parent's file.

    path: as it was given. sha256: of the file. rows: all of them. fitting: whether the method reads data. max_length:
    of a row in tokens.
    """

    path: str
    sha256: str
    rows: Sequence[Row]
    fitting: bool
    max_length: int

    @property
    def fitted(self) -> Sequence[Row]:
        """Rows that the method reads: every other one, from the first on."""
        return self.rows[::2] if self.fitting else []

    @property
    def held_out(self) -> Sequence[Row]:
        """Rows that judge what it made: the others."""
        return self.rows[1::2] if self.fitting else self.rows

    @property
    def name(self) -> str:
        """The file without its folders."""
        return self.path if self.path.startswith("hub:") else Path(self.path).name


def read_rows(settings: MergeSettings, fitting: bool, lengths: Sequence[int]) -> list[ParentRows]:
    """The file of every parent. Raises DataError with each that cannot be read or holds other data than it should.

    lengths: of each parent's rows in tokens at most, where the settings name none.
    fitting: the method reads data, so that every other row, from the first on, is its own and no row judges it that
    it has read. Without, all rows are held out.
    """
    each = zip(map(named, settings.dataset), lengths, strict=True) if settings.dataset else ()
    return read_several(each, lambda one: _read(*one, settings, fitting), "These data files cannot be used:")


def _read(one: Named, length: int, settings: MergeSettings, fitting: bool) -> ParentRows:
    source = read_source(one.path, settings.columns, settings.limit)
    sha256, rows = source.sha256(), source.rows
    if one.identity not in (None, sha256):
        raise DataError(
            f"{one.path} holds other data than the recipe was written for: sha256 {sha256}, wanted {one.identity}. "
            "Restore it; or, to merge with what is there now, leave @sha256:... out"
        )
    refuse_pairs(rows, one.path, "are not compared")
    if len(rows) < 1 + fitting:
        wanted = "two rows at least: one to read, one to judge by" if fitting else "one row at least"
        raise DataError(f"{one.path} has {len(rows)} rows; wanted {wanted}")
    return ParentRows(one.path, sha256, rows, fitting, settings.max_length or length)
