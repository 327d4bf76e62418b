"""What several adapters are called in tables, after their folders."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from veneer.adapter.attach import is_name

LONGEST = 50  # letters of a folder's name


def labels_of(folders: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """The folders' names; all with their place behind them where two are alike, one is taken, or one cannot name an
    adapter. No two are equal."""
    names = [re.sub(r"[^A-Za-z0-9_-]", "_", Path(folder).resolve().name)[:LONGEST] for folder in folders]
    plain = len(set(names)) == len(names) and all(is_name(name) and name not in taken for name in names)
    return names if plain else [f"{name}_{place}" for place, name in enumerate(names, start=1)]
