"""Preference pairs: one prompt, a chosen and a rejected answer to it.

row  --read_pair-->  Pair  --encode_pairs-->  EncodedPairs: two Examples a row, targets on the answer alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from veneer.data.examples import EncodedRows, Example, ExamplePair
from veneer.data.files import by_fault, read_each
from veneer.data.layouts import Conversation, Message, plain_turn, read_messages, read_prompt
from veneer.data.tools import read_tools
from veneer.errors import DataError, listed

if TYPE_CHECKING:
    from veneer.data.chat import Template

SIDES = ("chosen", "rejected")
WANTED_PAIR = (
    "Wanted: `chosen` and `rejected`, each an answer (text or messages) to a `prompt` (text or messages), or each a "
    "whole conversation that begins like the other. A larger --max-length keeps longer prompts."
)


@dataclass(frozen=True)
class Pair:
    """Two conversations that are the same up to the answers. Messages of the prompt are marked untrained, so that
    `trained_turns` of both are the answer's."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True)
class EncodedPairs(EncodedRows):
    """`examples` holds the pairs one after another, chosen before rejected; a split moves a pair as one."""

    @property
    def pairs(self) -> list[ExamplePair]:
        """Of each row. Both answers begin with the same ids, `example.prompt`."""
        return list(map(ExamplePair, self.examples[::2], self.examples[1::2]))

    def groups(self) -> list[Any]:
        return [pair.chosen.prompt for pair in self.pairs]

    def pick(self, units: Any) -> tuple[ExamplePair, ...]:
        return tuple(map(self.pairs.__getitem__, units))

    def label(self, index: int) -> str:
        return f"{super().label(index)}, {SIDES[index % 2]}"


def is_preference(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are rows of preference pairs: told by the first."""
    return bool(rows) and set(SIDES) <= set(rows[0])


def chosen_alone(row: Mapping[str, Any]) -> str:
    """The option with which the chosen side of rows like this is read as conversations of their own."""
    if "messages" in row:
        return "--columns prompt=messages,completion=chosen"
    whole = isinstance(row["chosen"], list) and row["chosen"] and isinstance(row["chosen"][0], Mapping)
    return f"--columns {'messages' if whole and row['chosen'][0].get('role') != 'assistant' else 'completion'}=chosen"


def refuse_pairs(rows: Sequence[Mapping[str, Any]], name: str, why: str, next_step: str | None = None) -> None:
    """Raises DataError where these are preference pairs; `why` goes on after `which`. Without another next step, one
    side is to be named."""
    if is_preference(rows):
        told = next_step or f"name one side, {chosen_alone(rows[0])}"
        raise DataError(f"{name} holds preference pairs, `chosen` and `rejected`, which {why}. Next: {told}.")


def encode_pairs(rows: Sequence[Mapping[str, Any]], template: Template, max_length: int, path: str) -> EncodedPairs:
    """All rows as pairs of examples; `path` names the file in messages. DataError lists all faults: rows that cannot
    be read, that the template cannot render, or whose answers are cut away by `max_length`."""
    faults: dict[int, str] = {}
    read = read_each(rows, read_pair, faults)
    sides = [
        template.encode_all({index: getattr(pair, side) for index, pair in read.items()}, max_length, faults)
        for side in SIDES
    ]
    chosen, rejected = ({example.row: example for example in side} for side in sides)
    whole = [index for index in read if index not in faults]
    apart = [index for index in whole if chosen[index].prompt != rejected[index].prompt]
    faults |= dict.fromkeys(apart, "the chat template writes the prompt differently before each answer")
    if faults or not rows:
        lines = by_fault(faults)
        headline = f"{path}: {len(faults):,} of {len(rows):,} rows cannot be read as preference pairs:"
        raise DataError(listed(headline, lines, WANTED_PAIR) if rows else f"{path} has no rows. {WANTED_PAIR}")
    examples = tuple(side[index] for index in whole for side in (chosen, rejected))
    dropped = sum(example.dropped for example in examples)
    return EncodedPairs(examples, dropped, (), tuple(_notes(rows, examples, template, max_length)))


def read_pair(row: Mapping[str, Any], faults: list[str]) -> Pair | None:
    """The pair in a row; None and the reasons added to `faults` where there is none.

    The prompt is `prompt` (or `instruction`, `question`), text or messages, or `messages`, or `conversations`; or the
    messages that both conversations begin with (TRL's implicit prompt).
    """
    tools, before = read_tools(row.get("tools"), faults), _prompt(row, faults)
    sides = {side: _side(row, side, faults) for side in SIDES}
    if faults:
        return None
    if all(messages[0]["role"] != "assistant" for messages in sides.values()):  # whole conversations
        shared = _shared(*sides.values())
        if before is not None and before[-1]["content"] != (shared[-1]["content"] if shared else None):
            faults.append("`chosen` and `rejected` are whole conversations that do not begin with the prompt given")
        before, sides = shared, {side: messages[len(shared) :] for side, messages in sides.items()}
    elif before is None:
        faults.append("has no `prompt`, and `chosen` and `rejected` are not whole conversations")
    if sides["chosen"] == sides["rejected"]:
        faults.append("`chosen` and `rejected` are equal: there is nothing to prefer")
    elif any(not messages or messages[0]["role"] != "assistant" for messages in sides.values()):
        faults.append("`chosen` and `rejected` part before the answer: wanted the same messages up to it")
    if faults or before is None:
        return None
    context = [{**message, "train": False} for message in before]
    made = {side: Conversation((*context, *found), _answer(found), "messages", tools) for side, found in sides.items()}
    return Pair(**made)


def _prompt(row: Mapping[str, Any], faults: list[str]) -> list[Message] | None:
    if "messages" in row or "conversations" in row:
        field = "messages" if "messages" in row else "conversations"
        turns = row[field]
        turns = [plain_turn(turn, bool(row.get("tools"))) for turn in turns] if isinstance(turns, list) else turns
        return read_messages(turns, field, None, faults)
    if "prompt" not in row and row.get("question"):
        row = {**row, "prompt": row["question"]}
    if not row.get("prompt") and not row.get("instruction"):
        return None
    return read_prompt(row, faults)


def _side(row: Mapping[str, Any], side: str, faults: list[str]) -> list[Message]:
    """The messages of one side, up to its last assistant's."""
    value = row.get(side)
    value = [plain_turn(turn) for turn in value] if isinstance(value, list) else plain_turn(value)
    messages = read_messages(value, side, "assistant", faults)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies and not faults:
        faults.append(f"`{side}` has no assistant's turn")
    return messages[: replies[-1] + 1] if replies else []


def _shared(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages that both begin with, short of the last of either."""
    end = 0
    while end < min(len(chosen), len(rejected)) - 1 and chosen[end] == rejected[end]:
        end += 1
    return chosen[:end]


def _answer(messages: list[Message]) -> tuple[str, ...]:
    return () if "tool_calls" in messages[-1] else (messages[-1]["content"],)


def _notes(
    rows: Sequence[Mapping[str, Any]], examples: Sequence[Example], template: Template, max_length: int
) -> list[str]:
    notes = [f"{len(rows):,} preference pairs: `chosen` and `rejected` answers to one prompt", *template.notes]
    cut = [example.dropped for example in examples if example.dropped]
    if cut:
        notes.append(f"{len(cut):,} answers are cut at max_length {max_length}: {sum(cut):,} tokens are left out")
    return notes
