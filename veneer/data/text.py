"""Rows of `text` for continued pretraining: documents, joined with the end token between them and cut into chunks.

Two chunks that follow one another share a token, the last of one and the first of the other: so every token is
predicted once, but for the very first, and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from veneer.data.examples import EncodedRows, Example
from veneer.data.files import kind_of, shortened
from veneer.data.layouts import renamed
from veneer.errors import DataError, listed

if TYPE_CHECKING:
    from veneer.data.chat import Template

# Columns that make a row a conversation, whatever `text` beside them is.
_SPOKEN = {"messages", "prompt", "completion", "instruction", "chosen", "rejected"}
# Columns that look like an answer to `text`.
_ANSWERS = ("label", "labels", "target", "answer", "output", "response", "summary", "sentiment", "category", "class")
WANTED_TEXT = "Wanted: a row for each document, its text in `text`."


@dataclass(frozen=True)
class Document:
    """A row's token ids, with the end token after them."""

    input_ids: tuple[int, ...]
    row: int


@dataclass(frozen=True)
class EncodedText(EncodedRows):
    """Chunks of all documents; what a split moves is a document, and only then are chunks cut."""

    documents: tuple[Document, ...]
    max_length: int

    def groups(self) -> list[Hashable]:
        return [document.input_ids for document in self.documents]

    def pick(self, units: Iterable[int]) -> tuple[Example, ...]:
        return chunks([self.documents[unit] for unit in units], self.max_length)

    def label(self, index: int) -> str:
        return f"chunk {index + 1}"


def is_text(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are rows of `text` alone: other columns may stand beside it, but none that makes a conversation."""
    return bool(rows) and all("text" in row and not _SPOKEN & set(row) and renamed(row)[1] is None for row in rows)


def encode_text(rows: Sequence[Mapping[str, Any]], template: Template, max_length: int, path: str) -> EncodedText:
    """All rows as documents and chunks. Empty texts are left out and counted; DataError lists all faults."""
    faults = [f"row {number}: {fault}" for number, row in enumerate(rows, start=1) if (fault := _fault(row))]
    if faults:
        headline = f"{path}: {len(faults):,} of {len(rows):,} rows cannot be trained on:"
        raise DataError(listed(headline, shortened(faults), WANTED_TEXT))
    if max_length < 2:
        raise DataError(f"max_length is {max_length}: a chunk of text is at least 2 tokens, one to predict the other")
    kept = [(number, row["text"]) for number, row in enumerate(rows) if row["text"].strip()]
    if not kept:
        raise DataError(f"{path}: all of its {len(rows):,} texts are empty. {WANTED_TEXT}")
    ids = template.document_ids([text for _, text in kept])
    documents = tuple(Document(tuple(one), row) for one, (row, _) in zip(ids, kept, strict=True))
    examples = chunks(documents, max_length)
    return EncodedText(examples, 0, (), tuple(_notes(rows, documents, examples, template)), documents, max_length)


def chunks(documents: Sequence[Document], max_length: int) -> tuple[Example, ...]:
    """Documents laid end to end and cut: every chunk begins with the last token of the one before."""
    ids = list(chain.from_iterable(document.input_ids for document in documents))
    row_of = list(chain.from_iterable([document.row] * len(document.input_ids) for document in documents))
    found = []
    for start in range(0, len(ids) - 1, max_length - 1):
        piece = tuple(ids[start : start + max_length])
        found.append(Example(piece, (False, *[True] * (len(piece) - 1)), row_of[start + 1], 0))
    return tuple(found)


def _fault(row: Mapping[str, Any]) -> str:
    text = row["text"]
    if answers := [name for name in _ANSWERS if name in row]:
        return (
            f"has `text` and `{answers[0]}`: to train on the answers give --columns prompt=text,completion="
            f"{answers[0]}, to train on the texts alone --columns text=text"
        )
    if not isinstance(text, str):
        return f"`text` is {kind_of(text)}, wanted text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "`text` is not valid Unicode"
    return ""


def _notes(
    rows: Sequence[Mapping[str, Any]], documents: Sequence[Document], examples: Sequence[Example], template: Template
) -> list[str]:
    end = template.tokenizer.eos_token
    notes = [
        f"`text` is trained on as it stands, every token of it: {len(documents):,} documents, {end} after each, became "
        f"{len(examples):,} chunks of up to {max(len(example.input_ids) for example in examples):,} tokens"
    ]
    others = sorted({name for row in rows for name in row} - {"text"})
    if others:
        notes.append(f"of these columns nothing is read: {', '.join(others)}")
    if empty := len(rows) - len(documents):
        notes.append(f"{empty:,} empty texts are left out")
    if template.system_prompt is not None:
        notes.append("the system prompt stands before no text: there is no conversation")
    return notes
