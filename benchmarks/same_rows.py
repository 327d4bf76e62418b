"""A metric of one's own, for `veneer eval --metrics benchmarks/same_rows.py:same_rows`: does a query find the same?

GeoQuery's database answers the predicted and the wanted query; they are right alike when they return the same rows, in
any order. A query that the database refuses is wrong.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATABASE = ROOT / os.environ.get("VENEER_DATA", "../shared/data") / "sql" / "geography.sqlite"
MOST_STEPS = 10**7  # of SQLite's machine: a predicted query may join everything with everything


def same_rows(predictions: list[str], references: list[list[str]]) -> list[float]:
    """1 for each prediction that returns what one of its references returns, else 0."""
    with sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True) as database:
        found = [rows(database, query) for query in predictions]
        wanted = [[rows(database, query) for query in queries] for queries in references]
    return [float(got is not None and got in any_of) for got, any_of in zip(found, wanted, strict=True)]


def rows(database: sqlite3.Connection, query: str) -> Counter[tuple[object, ...]] | None:
    """Rows and how often each; None where the query does not run, or not in MOST_STEPS."""
    left = iter(range(MOST_STEPS // 1000))
    database.set_progress_handler(lambda: next(left, None) is None, 1000)
    try:
        cursor = database.execute(query)
        return None if cursor.description is None else Counter(cursor.fetchall())
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
