"""Multiple choice in a data row: `choices` beside the question, and `answer`, which of them is right."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from veneer.data.files import kind_of


class Choices(NamedTuple):
    """The texts to choose from, and the place of the right one, from 0."""

    texts: tuple[str, ...]
    answer: int

    @property
    def right(self) -> str:
        """The text of the right one."""
        return self.texts[self.answer]


def is_choice(row: Mapping[str, Any]) -> bool:
    """Whether the row's reply is the right one of its `choices`."""
    return "choices" in row and not {"messages", "completion"} & set(row)


def read_choices(row: Mapping[str, Any], faults: list[str]) -> Choices | None:
    """The choices of a row; None and the reasons added to `faults` where it has none that can be used.

    `choices` is a list of texts, or an object with `text` and `label` (Hugging Face's ARC). `answer` (`answerKey`; else
    `completion`) is a place as a number from 0, a letter from A, a label, or the text itself. What could be read in two
    ways, such as the answer "A" to the choices B and A, is a fault.
    """
    value: Any = row.get("choices")
    labels: Any = list(string.ascii_uppercase)
    if isinstance(value, Mapping) and {"text", "label"} <= set(value):
        value, labels = value["text"], value["label"]
    if not isinstance(labels, list) or not _are_texts(value):
        faults.append(f"`choices` is {kind_of(row.get('choices'))}, wanted a list of at least two texts")
        return None
    name = _named(row)
    if name is None:
        faults.append("has `choices` and no `answer`: wanted the right one's place (from 0), letter or text")
        return None
    places = _places(row[name], value, labels)
    if len(places) != 1:
        which = (
            "is none of the choices" if not places else f"could be each of {', '.join(repr(value[p]) for p in places)}"
        )
        wanted = f"a number from 0 to {len(value) - 1}, a letter from A (or a label), or the text of a choice"
        faults.append(f"`{name}` is {row[name]!r}, which {which}; wanted {wanted}")
        return None
    return Choices(tuple(value), places[0])


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) and text.strip() for text in value)


def _named(row: Mapping[str, Any]) -> str | None:
    return next((name for name in ("answer", "answerKey", "completion") if row.get(name) is not None), None)


def _places(answer: Any, texts: list[str], labels: list[Any]) -> list[int]:
    """Every place that the answer may stand for; of equal texts the first."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = [answer] if 0 <= answer < len(texts) else []
    else:
        said = answer.strip() if isinstance(answer, str) else ""
        found = [i for i, text in enumerate(texts) if said == text.strip()]
        found += [i for i, label in enumerate(labels[: len(texts)]) if said.upper() == str(label).upper()]
    return sorted({texts.index(texts[place]) for place in found})
