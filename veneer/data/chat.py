"""From a data row to token ids and the mask of trained tokens.

    row  --conversation-->  Conversation  --Template.encode-->  Example          encode_rows does a whole file

The mask is found by rendering prefixes of the conversation with the model's own chat template, so it holds for every
template that only ever appends; a template or a row for which that fails on the level of token ids is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import TemplateError

from veneer.data.examples import EncodedRows, Example
from veneer.data.files import by_fault, read_each
from veneer.data.layouts import (
    MEND_ROWS,
    UNKNOWN_FIELDS,
    WANTED_ROW,
    Conversation,
    Message,
    conversation,
    read_conversation,
    renamed,
    untrained,
)
from veneer.data.tools import Tools
from veneer.errors import DataError, listed

__all__ = ["Conversation", "EncodedRows", "Example", "Template", "conversation", "encode_rows", "reading_notes"]


Spoken = tuple[list[Message], Tools]  # what a template is given


class Turn(NamedTuple):
    """A trained turn: the conversation up to the opening of the reply, and up to its end."""

    opened: str
    closed: str


def encode_rows(
    rows: Sequence[Mapping[str, Any]], template: Template, max_length: int, path: str, strict: bool = True
) -> EncodedRows:
    """All rows as examples. `path` names the file in messages, which count rows from 1.

    A row that is malformed, that the template cannot render, or that has no trained token within `max_length` is a
    fault. Strict: all faults in one DataError. Otherwise such rows are left out, listed in `rows_without_targets`,
    and the message is a note; only where no row is left is it an error.
    """
    faults: dict[int, str] = {}
    conversations = read_each(rows, read_conversation, faults)
    examples = template.encode_all(conversations, max_length, faults)
    notes = [*template.notes, *_notes(rows, examples, template, max_length), *_marks(conversations.values())]
    if faults:
        headline = f"{path}: {len(faults):,} of {len(rows):,} rows cannot be trained on:"
        strange = any(UNKNOWN_FIELDS in fault for fault in faults.values())
        notes.append(listed(headline, by_fault(faults), WANTED_ROW if strange else MEND_ROWS))
    if (faults and strict) or not examples:
        raise DataError(notes[-1] if faults else f"{path} has no rows. {WANTED_ROW}")
    dropped = sum(example.dropped for example in examples)
    return EncodedRows(tuple(examples), dropped, tuple(sorted(faults)), tuple(notes))


class Template:
    """The model's chat template with its tokenizer: conversations to token ids.

    A tokenizer without a template gets a plain layout, `prompt + "\\n" + completion + end token`, and `notes` says so.
    `system_prompt` opens every conversation that has no system message of its own; None leaves the template's default.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        self.notes: tuple[str, ...] = ()
        self._layout: str | None = None  # None: the tokenizer's own template
        if not tokenizer.chat_template:
            self._layout = plain_layout(tokenizer, self.name)
            self.notes = (f"{self.name} has no chat template: a row is prompt, line break, completion, end token",)
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def encode(self, conv: Conversation, row: int, max_length: int) -> Example:
        """One conversation; raises DataError where `encode_all` reports a fault."""
        faults: dict[int, str] = {}
        examples = self.encode_all({row: conv}, max_length, faults)
        if faults:
            raise DataError(f"row {row + 1}: {faults[row]}")
        return examples[0]

    def encode_all(
        self, conversations: Mapping[int, Conversation], max_length: int, faults: dict[int, str]
    ) -> list[Example]:
        """Examples of all conversations (by row) that have one; `faults` receives the reason for each other row.

        The ids are those of the tokenised whole conversation, cut after the last trained token (what follows could
        influence nothing) and at `max_length`.
        """
        turns_of = self._rendered_turns(conversations, faults)
        ids = self._tokenise([text for turns in turns_of.values() for turn in turns for text in turn])
        examples = []
        for row, turns in turns_of.items():
            fault = self._broken_prefix(turns, ids)
            targets = [] if fault else self._targets(turns, ids)
            if fault or not any(targets[:max_length]):
                faults[row] = fault or f"{targets.index(True)} tokens come before the reply, max_length is {max_length}"
                continue
            whole, kept = ids[turns[-1].closed], tuple(targets[:max_length])
            examples.append(Example(tuple(whole[: len(kept)]), kept, row, len(targets) - len(kept)))
        return examples

    def prompt_ids(self, conv: Conversation) -> list[int]:
        """What generation starts from: all before the final assistant's turn (or all, if a user speaks last), then
        the template's opening of a reply. An exact prefix of the example's ids; DataError where it cannot be."""
        text = self._prompt(conv)
        return list(self._tokenise([text])[text])

    def reply(self, conv: Conversation) -> str:
        """The final assistant's turn as a generator that skips special tokens would print it, its calls of tools
        spelt as the template spells them."""
        opened, closed = self._prompt(conv), self._render([_spoken(conv, len(conv.messages))], opened=False)[0]
        if isinstance(closed, Exception) or not closed.startswith(opened):
            raise DataError(self._refuses(closed) if isinstance(closed, Exception) else self._rewrites())
        ids = self._tokenise([opened, closed])
        return str(self.tokenizer.decode(ids[closed][len(ids[opened]) :], skip_special_tokens=True)).strip()

    def document_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, each with the end token after it (and the start token, where the tokenizer itself
        puts one). Raises DataError for a tokenizer without an end token."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise DataError(f"{self.name} has no end token to stand between texts; set the tokenizer's eos_token")
        start = [self.tokenizer.bos_token_id] if starts(self.tokenizer) else []
        found = self._tokenise(texts)
        return [[*start, *found[text], end] for text in texts]

    def _prompt(self, conv: Conversation) -> str:
        last = len(conv.messages) - (conv.messages[-1]["role"] == "assistant")
        text = self._render([_spoken(conv, last)], opened=True)[0]
        if isinstance(text, Exception):
            raise DataError(self._refuses(text))
        if unseen := self._unseen(conv):
            raise DataError(unseen)
        return text

    def closes(self, example: Example) -> bool:
        """Whether the example ends with a special token, from which the model learns to stop."""
        return self.is_special(example.input_ids[-1])

    def is_special(self, token: int) -> bool:
        """Whether the token is one of the template's marks, which no text can spell."""
        return token in self._special

    def _rendered_turns(
        self, conversations: Mapping[int, Conversation], faults: dict[int, str]
    ) -> dict[int, list[Turn]]:
        jobs = [(row, conv, turn) for row, conv in conversations.items() for turn in conv.trained_turns()]
        opened = self._render([_spoken(conv, turn) for _, conv, turn in jobs], opened=True)
        closed = self._render([_spoken(conv, turn + 1) for _, conv, turn in jobs], opened=False)
        turns: dict[int, list[Turn]] = {}
        for (row, conv, _), start, end in zip(jobs, opened, closed, strict=True):
            if not isinstance(start, str) or not isinstance(end, str):
                faults[row] = self._refuses(start if isinstance(start, Exception) else end)
            elif row in turns:
                turns[row].append(Turn(start, end))
            elif unseen := self._unseen(conv):
                faults[row] = unseen
            else:
                turns[row] = [Turn(start, end)]
        return {row: found for row, found in turns.items() if row not in faults}

    def _unseen(self, conv: Conversation) -> str:
        """What of tools, calls and results leaves no trace in the text, so that nothing would be learnt of it; empty
        where all does. Found by rendering without it."""
        messages = list(conv.messages)
        changed: dict[str, Spoken] = {}
        if conv.tools:
            changed["`tools`"] = (messages, ())
        if any("tool_calls" in message for message in messages):
            plain = [{name: part for name, part in message.items() if name != "tool_calls"} for message in messages]
            changed["`tool_calls`"] = (plain, conv.tools)
        if any(message["role"] == "tool" for message in messages):
            other = [{**m, "content": m["content"] + "."} if m["role"] == "tool" else m for m in messages]
            changed["messages of the role `tool`"] = (other, conv.tools)
        whole = self._render([(messages, conv.tools)], opened=False)[0] if changed else ""
        unseen = [what for what, spoken in changed.items() if self._render([spoken], opened=False)[0] == whole]
        return f"the chat template of {self.name} leaves out {' and '.join(unseen)}; {NO_TOOLS}" if unseen else ""

    def _render(self, batch: Sequence[Spoken], opened: bool) -> list[str | Exception]:
        """Each conversation as text (`opened`: with the opening of a reply), or the error that the template raised."""
        rendered: list[str | Exception] = []
        for tools, group in groupby(batch, key=lambda spoken: spoken[1]):
            rendered += self._render_with(tools, [self._with_system(messages) for messages, _ in group], opened)
        return rendered

    def _render_with(self, tools: Tools, batch: list[list[Message]], opened: bool) -> Iterator[str | Exception]:
        given: dict[str, Any] = {"tools": list(tools)} if tools else {}
        try:
            yield from self.tokenizer.apply_chat_template(
                batch, chat_template=self._layout, tokenize=False, add_generation_prompt=opened, **given
            )
        except (TemplateError, ValueError, TypeError) as error:
            if len(batch) == 1:
                yield error
            for messages in batch if len(batch) > 1 else ():
                yield from self._render_with(tools, [messages], opened)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system_prompt is None or (messages and messages[0]["role"] in ("system", "developer")):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _tokenise(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Ids of each distinct text; special tokens are in the text already, so that none are added."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        encoded = self.tokenizer(distinct, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return dict(zip(distinct, encoded["input_ids"], strict=True))

    def _targets(self, turns: list[Turn], ids: Mapping[str, list[int]]) -> list[bool]:
        """The mask over the conversation up to its last trained token."""
        targets = [False] * self._end(ids[turns[-1].closed])
        for opened, closed in turns:
            start, end = len(ids[opened]), self._end(ids[closed])
            targets[start:end] = [True] * (end - start)
        return targets

    def _end(self, closed: list[int]) -> int:
        """Where the trained part of a turn ends: white space that follows the template's end token is left out."""
        end = len(closed)
        while end and closed[end - 1] not in self._special and not self.tokenizer.decode(closed[end - 1 : end]).strip():
            end -= 1
        return end if end and closed[end - 1] in self._special else len(closed)

    def _broken_prefix(self, turns: list[Turn], ids: Mapping[str, list[int]]) -> str:
        """Why the ids of some turn are not where the whole conversation has them; empty where all are."""
        text, whole = turns[-1].closed, ids[turns[-1].closed]
        for opened, closed in turns:
            start, end = ids[opened], ids[closed][: self._end(ids[closed])]
            if not (text.startswith(opened) and text.startswith(closed)) or len(start) >= len(end):
                return self._rewrites()
            if whole[: len(start)] != start or whole[: len(end)] != end:
                joint = len(opened) if whole[: len(start)] != start else len(closed)
                beside = f"{text[joint - 8 : joint]!r} and {text[joint : joint + 8]!r}"
                return f"the chat template of {self.name} puts {beside} side by side, {MERGES}"
        return ""

    def _rewrites(self) -> str:
        return f"the chat template of {self.name} {REWRITES}"

    def _refuses(self, error: object) -> str:
        return f"the chat template of {self.name} refuses it: {error}"


REWRITES = (
    "writes a turn differently, or not at all, once others follow, so that it cannot be trained on as it would be "
    "generated; make one row of each assistant's turn, as prompt and completion"
)
NO_TOOLS = (
    "nothing would be learnt of them: take a base whose template knows tools, or write them into the messages' text"
)
MERGES = "which the tokenizer joins to a token that generation could never produce; strip the white space of the text"


def reading_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the user must know of how rows are read."""
    told = Counter(note for row in rows for note in [renamed(row)[1]] if note)
    notes = [f"{note} in {count:,} rows" for note, count in told.items()]
    if count := sum(bool(row.get("instruction")) and "messages" not in row for row in rows):
        notes.append(f"`instruction` stands before the prompt in {count:,} rows, as {{instruction}}\\n\\n{{prompt}}")
    return notes


def _notes(
    rows: Sequence[Mapping[str, Any]], examples: list[Example], template: Template, max_length: int
) -> list[str]:
    notes = reading_notes(rows)
    cut = [example.dropped for example in examples if example.dropped]
    if cut:
        cut_rows = "1 row is" if len(cut) == 1 else f"{len(cut):,} rows are"
        notes.append(f"{cut_rows} cut at max_length {max_length}: {sum(cut):,} tokens are left out")
    if any(not template.closes(example) for example in examples if not example.dropped):
        notes.append("an assistant's turn ends without a special token: the model does not learn where to stop")
    return notes


def plain_layout(tokenizer: Any, name: str) -> str:
    """A chat template of line breaks and end tokens, with a start token if the tokenizer itself would put one."""
    if tokenizer.eos_token is None:
        raise DataError(
            f"{name} has neither a chat template nor an end token, so that the model could not learn where to stop. "
            "Wanted: the model's instruct version, or a tokenizer with eos_token set."
        )
    turn = "{{ m['content'] + (eos_token if m['role'] == 'assistant' else '\\n') }}"
    return ("{{ bos_token }}" if starts(tokenizer) else "") + "{% for m in messages %}" + turn + "{% endfor %}"


def _marks(conversations: Iterable[Conversation]) -> list[str]:
    """What rows say of themselves beside their messages."""
    found = list(conversations)
    notes = []
    if tools := sum(bool(conv.tools) for conv in found):
        notes.append(f"`tools` are handed to the chat template in {tools:,} rows")
    if marked := sum(untrained(m) and m["role"] == "assistant" for conv in found for m in conv.messages):
        notes.append(f"{marked:,} assistant's turns are not trained on: `train` is false, or `weight` 0")
    return notes


def starts(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a start token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _spoken(conv: Conversation, end: int) -> Spoken:
    return list(conv.messages[:end]), conv.tools
