"""How each slot reads the rows: in the base's tokens, or with those that its adapter has added.

Slots of one tokenizer share what is made of the rows. Losses of different tokenizers are sums over the same text, all
divided by the tokens that the first slot makes of it: a token of one is no token of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from veneer.data.chat import Template
from veneer.data.examples import EncodedRows
from veneer.errors import DataError
from veneer.model.added_tokens import added_by, tokenizer_of

Made = TypeVar("Made")


def templates_of(loaded: Any, slots: Mapping[str, str | None], system_prompt: str | None) -> dict[str, Template]:
    """Label -> the slot's template; one object for all that read alike."""
    grown = {label: slot for label, slot in slots.items() if added_by(loaded.model, slot)}
    own = {label: Template(tokenizer_of(loaded, slot), system_prompt) for label, slot in grown.items()}
    base = Template(loaded.tokenizer, system_prompt)
    return {label: own.get(label, base) for label in slots}


def for_each(templates: Mapping[str, Template], make: Callable[[Template], Made]) -> dict[str, Made]:
    """Label -> what is made with its template; made once of each."""
    made = {id(template): make(template) for template in {id(t): t for t in templates.values()}.values()}
    return {label: made[id(template)] for label, template in templates.items()}


def check_whole(encoded: Mapping[str, EncodedRows], max_length: int, where: str) -> None:
    """Raises DataError where rows are cut (documents: into chunks), and not at the same place of the text for all."""
    each = list({id(rows): rows for rows in encoded.values()}.values())
    uneven = len({tuple(example.row for example in rows.examples) for rows in each}) > 1
    if len(each) > 1 and (uneven or any(rows.dropped_tokens for rows in each)):
        raise DataError(
            f"{where}: some rows are longer than {max_length:,} tokens, and slots with added tokens would be cut at "
            "another word than the base. Next: shorter rows, or one of them alone."
        )


def reading_note(templates: Mapping[str, Template]) -> list[str]:
    """What to know of losses of slots that do not read alike."""
    first, *others = templates.items()
    own = [label for label, template in others if template is not first[1]]
    if not own:
        return []
    return [
        f"{', '.join(own)} and {first[0]} read the text in different tokens: all losses are per token of {first[0]}, "
        "token_accuracy is of each one's own"
    ]
