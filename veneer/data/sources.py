"""A data set by its name: a file, a folder that `datasets` saved, or `hub:ORG/NAME`.

The Hub is asked only where the name says so: a path that does not exist is a typing error, not a download.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from veneer.data.columns import with_columns
from veneer.data.files import KINDS, Row, read_rows, without_nulls
from veneer.errors import DataError, listed

S = TypeVar("S")
T = TypeVar("T")
HUB = "hub:"
WANTED_HUB = "Wanted: hub:ORG/NAME, hub:ORG/NAME:SPLIT or hub:ORG/NAME:CONFIG:SPLIT."
# name, configuration, split; a colon inside the brackets of a split (train[:100]) parts nothing
_SPELLING = re.compile(r"(?P<name>[^:\[\]]+)(:(?P<config>[^:\[\]]+)(?=:))?(:(?P<split>.+))?")
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves: of one data set, of several splits


@dataclass(frozen=True)
class Source:
    """A data set that has been read."""

    name: str
    rows: list[Row]

    def sha256(self) -> str:
        """Of the file's bytes; of what has no file of its own, of its rows."""
        if Path(self.name).is_file():
            return hashlib.sha256(Path(self.name).read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True, default=str).encode()).hexdigest()


def read_source(name: str, columns: Mapping[Any, str] | None = None, limit: int | None = None) -> Source:
    """All rows of a data set, or its first `limit`, under our column names. Raises DataError with what to do next."""
    rows = _rows(name)[:limit]
    return Source(name, with_columns(rows, columns, name) if columns else rows)


def read_several(names: Iterable[S], read: Callable[[S], T], headline: str) -> list[T]:
    """`read` of each. Raises DataError with what is wrong with any of them, under the headline where several are."""
    found: list[T] = []
    faults: list[DataError] = []
    for name in names:
        try:
            found.append(read(name))
        except DataError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise DataError(listed(headline, [" ".join(str(fault).split()) for fault in faults]))
    return found


def _rows(name: str) -> list[Row]:
    if name.startswith(HUB):
        return _from_hub(name)
    path = Path(name)
    if path.is_dir() and any((path / file).exists() for file in _SAVED):
        return _plain(_loaded(name, "load_from_disk", name), name, lambda split: str(path / split))
    if not path.exists() and path.suffix.lower() not in KINDS and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"{name} does not exist. A data set of the Hugging Face Hub is written {HUB}{name}.")
    return read_rows(name)


def _from_hub(name: str) -> list[Row]:
    spelt = _SPELLING.fullmatch(name.removeprefix(HUB))
    if spelt is None:
        raise DataError(f"{name} is no name of a data set. {WANTED_HUB}")
    found = _loaded(name, "load_dataset", spelt["name"], spelt["config"], split=spelt["split"])
    config = f"{spelt['config']}:" if spelt["config"] else ""
    return _plain(found, name, lambda split: f"{HUB}{spelt['name']}:{config}{split}")


def _plain(found: Any, name: str, spell: Any) -> list[Row]:
    """The rows of a data set, or of the one split that a dictionary of them has."""
    if isinstance(found, Mapping):
        if len(found) != 1:
            raise DataError(f"{name} has several splits; name one: {', '.join(map(spell, found))}")
        found = next(iter(found.values()))
    rows = without_nulls(found.to_list())
    if not rows:
        raise DataError(f"{name} is empty: it has no rows.")
    return list(rows)


def _loaded(name: str, function: str, *where: str | None, **options: str | None) -> Any:
    """What a function of the package datasets gives; its errors as ours."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name} is read by the package datasets; next: pip install datasets") from error
    try:
        return getattr(datasets, function)(*where, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        wanted = WANTED_HUB if name.startswith(HUB) else ""
        raise DataError(f"{name} cannot be loaded: {told[0].rstrip('.')}. {wanted}".rstrip()) from error
