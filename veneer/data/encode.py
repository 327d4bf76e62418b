"""Rows of any layout to examples: which layout it is, is found in the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from veneer.data.chat import Template, encode_rows
from veneer.data.examples import EncodedRows
from veneer.data.preference import encode_pairs, is_preference
from veneer.data.text import encode_text, is_text

Family = Literal["conversation", "text", "preference"]


def family_of(rows: Sequence[Mapping[str, Any]]) -> Family:
    """What kind of thing the rows of a data set are."""
    if is_preference(rows):
        return "preference"
    return "text" if is_text(rows) else "conversation"


def encode(rows: Sequence[Mapping[str, Any]], template: Template, max_length: int, path: str) -> EncodedRows:
    """All rows as examples: EncodedText of texts, EncodedPairs of preference pairs. DataError lists all faults."""
    encoders = {"preference": encode_pairs, "text": encode_text, "conversation": encode_rows}
    return encoders[family_of(rows)](rows, template, max_length, path)
