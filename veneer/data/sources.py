"""Data files: JSON Lines to rows, and a row to the conversation that it spells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.errors import DataError, listed, nearest

Message = dict[str, Any]
Layout = Literal["prompt_completion", "messages"]

SUFFIXES = (".jsonl", ".ndjson")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN = 5  # faults named one by one in a message; the rest is counted
WANTED_FILE = "Wanted: a .jsonl file in UTF-8 with one JSON object on each line."
WANTED_ROW = "Wanted: `prompt` and `completion`, or `messages` (objects with `role` and `content`), with a reply."


@dataclass(frozen=True)
class Conversation:
    """One row: its messages, ending with an assistant's turn, and every answer that counts as right."""

    messages: tuple[Message, ...]
    references: tuple[str, ...]
    layout: Layout

    def trained_turns(self) -> list[int]:
        """Positions of the messages to learn: every assistant's turn, or the completion alone."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return turns[-1:] if self.layout == "prompt_completion" else turns


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a JSON Lines file, in file order; blank lines are skipped.

    Raises DataError where the file is missing, a folder, of another kind, empty, or has lines that are not JSON
    objects; all such lines are counted and the first few named with their line numbers.
    """
    file = _checked(Path(path))
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, line in enumerate(_content(file).split(b"\n"), start=1):
        if line.strip():
            row, fault = _parsed(line)
            rows.append(row)
            faults += [f"line {number}: {fault}"] if fault else []
    if faults:
        headline = f"{file}: {len(faults):,} of {len(rows):,} lines cannot be read:"
        raise DataError(listed(headline, shortened(faults), WANTED_FILE))
    if not rows:
        raise DataError(f"{file} is empty: it has no rows. {WANTED_FILE}")
    return rows


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """The conversation in a data row; raises DataError with all that is wrong with it, `where` naming the row.

    prompt + completion become a user's and an assistant's turn; each may also be a message, the prompt a list of them.
    `instruction` (and alpaca's `input`) stand before the prompt, apart by an empty line; `output` may stand for
    `completion` beside an instruction. What follows the last assistant's turn in `messages` is left out.
    """
    faults: list[str] = []
    result = read_conversation(row, faults)
    if result is None:
        raise DataError(listed(f"{where} cannot be used:", faults, WANTED_ROW))
    return result


def read_conversation(row: Mapping[str, Any], faults: list[str]) -> Conversation | None:
    """As `conversation`, for many rows: None and the reasons added to `faults`, where `conversation` raises."""
    answer = "output" if "instruction" in row and "completion" not in row else "completion"
    messages: list[Message] = []
    layout: Layout = "messages"
    if answer in row and "messages" in row:
        faults.append(f"has both `messages` and `{answer}`: wanted one of them")
    elif answer in row and ("prompt" in row or "instruction" in row):
        messages, layout = [*_prompt(row, faults), *_completion(row[answer], answer, faults)], "prompt_completion"
    elif "messages" in row:
        messages = _up_to_last_reply(_messages(row["messages"], "messages", None, faults), faults)
    else:
        faults.append(f"has the fields {', '.join(map(repr, row))}" if row else "has no fields")
    if row.get("tools") not in (None, "", "[]", []):
        faults.append("`tools` is not handed to the chat template yet: write the tools into a system message")
    if faults:
        return None
    references = _references(row.get("references"), messages[-1]["content"], faults)
    return None if faults else Conversation(tuple(messages), references, layout)


def shortened(faults: list[str]) -> list[str]:
    """The first faults and the count of the others."""
    rest = len(faults) - SHOWN
    return faults[:SHOWN] + ([f"and {rest:,} more"] if rest > 0 else [])


def _checked(file: Path) -> Path:
    if file.is_dir():
        found = sorted(entry.name for entry in file.iterdir() if entry.suffix in SUFFIXES)
        inside = f" It holds {', '.join(found[:SHOWN])}." if found else ""
        raise DataError(f"{file} is a folder, not a data file.{inside} {WANTED_FILE}")
    if not file.exists():
        raise DataError(f"{file} does not exist.{_alternatives(file)} {WANTED_FILE}")
    if file.suffix.lower() not in SUFFIXES:
        kind = f"of kind {file.suffix!r}" if file.suffix else "without a suffix"
        raise DataError(f"{file} is a file {kind}, which is not read. {WANTED_FILE}")
    return file


def _alternatives(file: Path) -> str:
    if not file.parent.is_dir():
        return f" Neither does the folder {file.parent}."
    near = nearest(file.name, (entry.name for entry in file.parent.iterdir()))
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors write a byte order mark
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error


def _parsed(line: bytes) -> tuple[dict[str, Any], str]:
    """The object on a line and an empty string, or nothing and what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
    except (ValueError, RecursionError) as error:  # ValueError: broken JSON, or a number of too many digits
        return {}, f"broken JSON: {error}"
    if not isinstance(row, dict):
        return {}, f"got {_kind(row)}, wanted an object"
    return row, ""


def _prompt(row: Mapping[str, Any], faults: list[str]) -> list[Message]:
    """The prompt's messages; an instruction and alpaca's input make one text with it."""
    prompt = row.get("prompt", "")
    before = [row[field] for field in ("instruction", "input") if row.get("instruction") and row.get(field)]
    if not before:
        return _messages(prompt, "prompt", "user", faults)
    parts = [*before, *([prompt] if prompt else [])]
    if all(isinstance(part, str) for part in parts):
        return _messages("\n\n".join(parts), "prompt", "user", faults)
    faults.append("`instruction`, `input` and `prompt` are wanted as text where one stands before another")
    return []


def _completion(value: Any, field: str, faults: list[str]) -> list[Message]:
    messages = _messages(value, field, "assistant", faults)
    if len(messages) > 1 or any(message["role"] != "assistant" for message in messages):
        faults.append(f"`{field}` is not one assistant's message: wanted that, or `messages` for several")
    return messages


def _up_to_last_reply(messages: list[Message], faults: list[str]) -> list[Message]:
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken and not faults:
        faults.append("`messages` has no assistant's turn: there is nothing to learn")
    return messages[: spoken[-1] + 1] if spoken else []


def _messages(value: Any, field: str, role: str | None, faults: list[str]) -> list[Message]:
    """Messages from a text (spoken by `role`), a message, or a list of messages."""
    if isinstance(value, str) and role:
        return [_message({"role": role, "content": value}, field, faults)]
    if isinstance(value, Mapping):
        return [_message(value, field, faults)]
    if isinstance(value, list) and value:
        return [_message(item, f"{field}[{i}]", faults) for i, item in enumerate(value)]
    faults.append(f"`{field}` is {_kind(value)}, wanted {'text or ' if role else ''}a list of messages")
    return []


def _message(value: Any, field: str, faults: list[str]) -> Message:
    """The message with its content as plain text; of no use where `faults` grew."""
    if not isinstance(value, Mapping) or not {"role", "content"} <= set(value):
        faults.append(f"`{field}` is {_kind(value)}, wanted an object with `role` and `content`")
        return {"role": "", "content": ""}
    role, content = value["role"], _text(value["content"])
    if role not in ROLES:
        near = nearest(str(role), ROLES, limit=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        faults.append(f"`{field}` has the role {role!r}, wanted one of {', '.join(ROLES)}{meant}")
    if content is None:
        faults.append(f"`{field}` holds {_kind(value['content'])}, wanted valid Unicode text")
    elif role == "assistant" and not content.strip():
        faults.append(f"`{field}` is empty: there is nothing to learn")
    return {**value, "content": content}


def _references(value: Any, reply: str, faults: list[str]) -> tuple[str, ...]:
    """The accepted answers: the row's own, or its reply alone."""
    references = [reply] if value is None else value
    if isinstance(references, list) and references and all(isinstance(text, str) for text in references):
        return tuple(references)
    faults.append(f"`references` is {_kind(value)}, wanted a list of at least one text")
    return ()


def _text(content: Any) -> str | None:
    """A message's content from text or a list of text parts; None for all else, lone surrogates among it."""
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        texts = [part["text"] for part in content if part.get("type") == "text" and isinstance(part.get("text"), str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str):
        return None
    try:
        content.encode()
    except UnicodeEncodeError:  # no tokenizer takes half a surrogate pair, though JSON can spell one
        return None
    return content


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {"NoneType": "null", "bool": "a truth value", "int": "a number", "float": "a number"}
    names |= {"str": "text", "list": "a list" if value else "an empty list", "dict": "an object"}
    return names.get(type(value).__name__, type(value).__name__)
