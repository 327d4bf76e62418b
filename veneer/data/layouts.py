"""A data row to the conversation that it spells: the layouts that data sets come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from veneer.data.choices import is_choice, read_choices
from veneer.data.files import kind_of
from veneer.data.tools import CALLER_ROLES, Tools, joined_calls, read_calls, read_tools
from veneer.errors import DataError, listed, nearest

Message = dict[str, Any]
Layout = Literal["prompt_completion", "messages"]

ROLES = ("system", "developer", "user", "assistant", "tool")
# What ShareGPT's descendants call them.
_OTHER_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "ipython"), "tool"),
}
# Two columns that are prompt and completion under other names, the first that a row has.
_PAIRS = (
    *(("question", "answer"), ("query", "response"), ("problem", "solution"), ("source", "target")),
    *(("input", "output"), ("document", "summary"), ("dialogue", "summary"), ("article", "highlights")),
)
WANTED_ROW = (
    "Wanted: `prompt` and `completion` (or a pair such as question and answer, instruction and output), or `messages` "
    "(objects with `role` and `content`), with a reply; or `text` alone. Next: name your columns, --columns "
    "prompt=COLUMN,completion=COLUMN; `veneer data preview` shows what is read."
)
MEND_ROWS = "Next: mend these rows, or take them out of the file; a larger --max-length reads more of each."
UNKNOWN_FIELDS = "has the fields "
NO_REPLY = "has no assistant's turn: there is nothing to learn"
MARKED = "trains no assistant's turn: each is marked with `train` false or `weight` 0"


@dataclass(frozen=True)
class Conversation:
    """One row: its messages, ending with an assistant's turn, and every answer that counts as right: none given where
    that turn calls tools, for only a chat template can spell it. `tools` are the schemas of what may be called."""

    messages: tuple[Message, ...]
    references: tuple[str, ...]
    layout: Layout
    tools: Tools = ()

    def trained_turns(self) -> list[int]:
        """Positions of the messages to learn: every assistant's turn that is not marked, or the completion alone."""
        turns = _trained(self.messages)
        return turns[-1:] if self.layout == "prompt_completion" else turns


def _trained(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and not untrained(message)]


def untrained(message: Mapping[str, Any]) -> bool:
    """Whether a message is marked as one not to learn from: `train` false, or OpenAI's `weight` 0."""
    return message.get("train") is False or message.get("weight") == 0


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """The conversation in a data row; raises DataError with all that is wrong with it, `where` naming the row.

    prompt + completion become a user's and an assistant's turn; each may also be a message, the prompt a list of them.
    `instruction` (and alpaca's `input`, Dolly's `context`) stand before the prompt, apart by an empty line; `output` or
    `response` may stand for `completion` beside an instruction. `conversations` with `from` and `value` are messages,
    and some pairs of columns prompt and completion (`renamed`); of `choices`, the right one is the completion. An
    assistant's turn with `train` false or `weight` 0 is not learnt; what follows the last that is, is left out. `tools`
    holds the schemas of what `tool_calls` may call.
    """
    faults: list[str] = []
    result = read_conversation(row, faults)
    if result is None:
        raise DataError(listed(f"{where} cannot be used:", faults, WANTED_ROW))
    return result


def read_conversation(row: Mapping[str, Any], faults: list[str]) -> Conversation | None:
    """As `conversation`, for many rows: None and the reasons added to `faults`, where `conversation` raises."""
    if is_choice(row) and read_choices(row, faults) is None:
        return None
    row, _ = renamed(row)
    answer = "output" if "instruction" in row and "completion" not in row else "completion"
    messages: list[Message] = []
    layout: Layout = "messages"
    if answer in row and "messages" in row:
        faults.append(f"has both `messages` and `{answer}`: wanted one of them")
    elif answer in row and ("prompt" in row or "instruction" in row):
        messages, layout = [*read_prompt(row, faults), *_completion(row[answer], answer, faults)], "prompt_completion"
    elif "messages" in row:
        messages = _up_to_last_reply(read_messages(row["messages"], "messages", None, faults), faults)
    else:
        faults.append(f"{UNKNOWN_FIELDS}{', '.join(map(repr, row))}" if row else "has no fields")
    tools = read_tools(row.get("tools"), faults)
    if faults:
        return None
    references = _references(row.get("references"), messages[-1], faults)
    return None if faults else Conversation(tuple(messages), references, layout, tools)


def renamed(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The row under our names, and what to tell the user of it: None where it has them already."""
    if is_choice(row) and (choices := read_choices(row, [])):
        return _chosen(row, choices.right)
    if "messages" in row or "completion" in row:
        return row, None
    if isinstance(row.get("conversations"), list):
        turns = [plain_turn(turn, bool(row.get("tools"))) for turn in row["conversations"]]
        return {**row, "messages": turns}, "`conversations` are read as messages"
    if "instruction" in row:
        if "response" not in row or "output" in row:
            return row, None
        told = "`response` is the completion"
        context = {"input": row["context"]} if row.get("context") and "input" not in row else {}
        told += ", `context` stands before the prompt" if context else ""
        return {**row, **context, "output": row["response"]}, told
    names = {name.lower(): name for name in row}
    for pair in (("prompt", "completion"), *_PAIRS):
        if pair[0] in names and pair[1] in names and "prompt" not in row:
            prompt, completion = names[pair[0]], names[pair[1]]
            told = f"`{prompt}` is the prompt and `{completion}` the completion"
            return {**row, "prompt": row[prompt], "completion": row[completion]}, told
    return row, None


def _chosen(row: Mapping[str, Any], right: str) -> tuple[Mapping[str, Any], str]:
    """A row of multiple choice as prompt and completion; `context`, such as a passage, stands before the question."""
    told = "the right one of `choices` is the completion"
    if "prompt" in row or "question" not in row:
        return {**row, "completion": right}, told
    context = row.get("context")
    told += ", `question` the prompt" + (", after `context`" if context else "")
    prompt = f"{context}\n\n{row['question']}" if context else row["question"]
    return {**row, "prompt": prompt, "completion": right}, told


def plain_turn(turn: Any, with_tools: bool = False) -> Any:
    """A turn of ShareGPT as a message. Where the row names its tools, a function_call is a call, else a text."""
    if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
        return turn
    role = turn["from"]
    if with_tools and role in CALLER_ROLES:
        return {"role": role, "content": turn["value"]}
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {**rest, "role": _OTHER_ROLES.get(role, role) if isinstance(role, str) else role, "content": turn["value"]}


def read_prompt(row: Mapping[str, Any], faults: list[str]) -> list[Message]:
    """The prompt's messages; an instruction and alpaca's input make one text with it."""
    prompt = row.get("prompt", "")
    before = [row[field] for field in ("instruction", "input") if row.get("instruction") and row.get(field)]
    if not before:
        return read_messages(prompt, "prompt", "user", faults)
    parts = [*before, *([prompt] if prompt else [])]
    if all(isinstance(part, str) for part in parts):
        return read_messages("\n\n".join(parts), "prompt", "user", faults)
    faults.append("`instruction`, `input` and `prompt` are wanted as text where one stands before another")
    return []


def _completion(value: Any, field: str, faults: list[str]) -> list[Message]:
    messages = read_messages(value, field, "assistant", faults)
    if len(messages) > 1 or any(message["role"] != "assistant" for message in messages):
        faults.append(f"`{field}` is not one assistant's message: wanted that, or `messages` for several")
    elif any(map(untrained, messages)):
        faults.append(f"`{field}` {MARKED}")
    return messages


def _up_to_last_reply(messages: list[Message], faults: list[str]) -> list[Message]:
    spoken = _trained(messages)
    if not spoken and not faults:
        replies = any(message["role"] == "assistant" for message in messages)
        faults.append(f"`messages` {MARKED if replies else NO_REPLY}")
    return messages[: spoken[-1] + 1] if spoken else []


def read_messages(value: Any, field: str, role: str | None, faults: list[str]) -> list[Message]:
    """Messages from a text (spoken by `role`), a message, or a list of messages."""
    if isinstance(value, str) and role:
        return [_message({"role": role, "content": value}, field, faults)]
    if isinstance(value, Mapping):
        return [_message(value, field, faults)]
    if isinstance(value, list) and value:
        return joined_calls([_message(item, f"{field}[{i}]", faults) for i, item in enumerate(value)])
    faults.append(f"`{field}` is {kind_of(value)}, wanted {'text or ' if role else ''}a list of messages")
    return []


def _message(value: Any, field: str, faults: list[str]) -> Message:
    """The message with its content as plain text and its calls in one form; of no use where `faults` grew."""
    if not isinstance(value, Mapping) or "role" not in value or not {"content", "tool_calls"} & set(value):
        has = f"has only {', '.join(f'`{name}`' for name in value)}" if isinstance(value, Mapping) and value else ""
        wanted = "`role` and `content`, or `from` and `value`"
        faults.append(f"`{field}` {has or f'is {kind_of(value)}'}, wanted an object with {wanted}")
        return {"role": "", "content": ""}
    if value["role"] in CALLER_ROLES:
        value = {**value, "role": "assistant", "content": None, "tool_calls": value.get("content")}
    raw = value.get("content")
    calls = read_calls(value.get("tool_calls"), f"{field}.tool_calls", faults)
    content = "" if raw is None and calls else _text(raw)
    if content is None:
        faults.append(f"`{field}` holds {kind_of(raw)}, wanted valid Unicode text")
    faults += [f"`{field}` {fault}" for fault in _misspoken(value, content, calls)]
    rest = {name: part for name, part in value.items() if part is not None and name != "tool_calls"}
    return {**rest, "content": content or "", **({"tool_calls": calls} if calls else {})}


def _misspoken(message: Mapping[str, Any], content: str | None, calls: list[dict[str, Any]]) -> list[str]:
    """What is wrong with who speaks, and with the marks of what is trained."""
    role, train, weight, faults = message["role"], message.get("train"), message.get("weight"), []
    if role not in ROLES:
        near = nearest(str(role), ROLES, limit=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        faults.append(f"has the role {role!r}, wanted one of {', '.join(ROLES)}{meant}")
    if role == "assistant" and content is not None and not content.strip() and not calls and not untrained(message):
        faults.append("is empty: there is nothing to learn")
    if calls and role != "assistant":
        faults.append("has `tool_calls`, which only an assistant makes")
    if train not in (None, True, False) or (train is True and role != "assistant"):
        faults.append(f"has `train` {train!r}, wanted true or false, and true for an assistant's turn only")
    if weight not in (None, 0, 1):
        faults.append(f"has `weight` {weight!r}, wanted 0 (not trained on) or 1")
    return faults


def _references(value: Any, reply: Message, faults: list[str]) -> tuple[str, ...]:
    """The accepted answers: the row's own, or its reply alone."""
    if value is None:
        return () if "tool_calls" in reply else (reply["content"],)
    references = value
    if isinstance(references, list) and references and all(isinstance(text, str) for text in references):
        return tuple(references)
    faults.append(f"`references` is {kind_of(value)}, wanted a list of at least one text")
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
