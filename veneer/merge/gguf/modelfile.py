"""Ollama's Modelfile: which model, with which adapter, how a conversation is written, where an answer stops.

Ollama writes conversations with templates of Go's, not with the chat template of the tokenizer. What stands around the
words of each role is found by rendering a conversation; the result is tried on others, and where it differs from the
chat template there is no TEMPLATE, which is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jinja2 import TemplateError

NAME = "Modelfile"
SYSTEM, USER, ASSISTANT, AGAIN = "Ordinal", "Velvet", "Quarry", "Thicket"  # words that no template holds
Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # a conversation, and whether a reply is opened -> text


class Layout(NamedTuple):
    """What stands before and after the words of each role, what opens a reply, and the system prompt unless given."""

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    reply: str
    default: str | None

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation with a reply opened, as Ollama writes it by `go`."""
        spoken = [*messages]
        if self.default is not None and messages[0]["role"] != "system":
            spoken = [{"role": "system", "content": self.default}, *messages]
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        turns = [around[m["role"]][0] + m["content"] + around[m["role"]][1] for m in spoken]
        return self.start + "".join(turns) + self.reply

    def go(self) -> str:
        """The same as a template of Go's."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        turns = [f'eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, (before, after) in roles.items()]
        spoken = "{{ if " + "{{ else if ".join(turns) + "{{ end }}"
        opening = self.default if self.default is None else self.default.join(self.system)
        unless = '{{ if ne (index .Messages 0).Role "system" }}' + opening + "{{ end }}" if opening is not None else ""
        return f"{self.start}{unless}{{{{ range .Messages }}}}{spoken}{{{{ end }}}}{self.reply}"

    def literals(self) -> str:
        """All that stands in the template as it is."""
        around = [*self.system, *self.user, *self.assistant]
        return "".join([self.start, *around, self.reply, self.default or ""])


def layout_of(render: Render, bos: str | None = None) -> Layout | None:
    """The layout of a chat template, which may begin with the token `bos`; None for one that is more than words around
    each role's."""
    try:
        found = _found(render, bos or "")
        return found if found is not None and _same(found, render) and _spellable(found) else None
    except (TemplateError, ValueError, TypeError):  # it refuses such a conversation
        return None


def _spellable(layout: Layout) -> bool:
    return not any(mark in layout.literals() for mark in ("{{", '"""'))


def _talk(*words: str) -> list[Message]:
    roles = {SYSTEM: "system", USER: "user", ASSISTANT: "assistant", AGAIN: "user"}
    return [{"role": roles[word], "content": word} for word in words]


def _found(render: Render, bos: str) -> Layout | None:
    whole = render(_talk(SYSTEM, USER, ASSISTANT, AGAIN), False)
    parts = _cut(whole, (SYSTEM, USER, ASSISTANT, AGAIN))
    answered = _cut(render(_talk(SYSTEM, USER, ASSISTANT), False), (SYSTEM, USER, ASSISTANT))
    if parts is None or answered is None:
        return None
    first, system_user, user_assistant, assistant_user, last = parts
    after_assistant = answered[-1]
    user = assistant_user.removeprefix(after_assistant), last
    start = bos if first.startswith(bos) and not user[0].startswith(bos) else ""  # else it opens every turn
    system = first.removeprefix(start), system_user.removesuffix(user[0])
    reply = render(_talk(SYSTEM, USER, ASSISTANT, AGAIN), True).removeprefix(whole)
    layout = Layout(start, system, user, (user_assistant.removeprefix(last), after_assistant), reply, None)
    return layout._replace(default=_default(render(_talk(USER), True), layout))


def _cut(text: str, words: Sequence[str]) -> list[str] | None:
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _default(text: str, layout: Layout) -> str | None:
    """The system prompt that the template puts where a conversation has none."""
    rest = layout._replace(start="").text(_talk(USER))
    before, after = layout.start + layout.system[0], layout.system[1]
    if text == layout.start + rest or not (text.startswith(before) and text.endswith(after + rest)):
        return None
    return text[len(before) : len(text) - len(after + rest)]


def _same(layout: Layout, render: Render) -> bool:
    talks = [(USER,), (SYSTEM, USER), (USER, ASSISTANT, AGAIN), (SYSTEM, USER, ASSISTANT, AGAIN)]
    return all(layout.text(_talk(*talk)) == render(_talk(*talk), True) for talk in talks)


def modelfile(model: str, adapter: str | None, layout: Layout | None, system: str | None, stops: Sequence[str]) -> str:
    """The text of a Modelfile. model, adapter: files or folders. system: the prompt of training."""
    lines = [f"FROM {model}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    if layout is not None:
        lines.append(f'TEMPLATE """{layout.go()}"""')
    if system and spellable(system):
        lines.append(f"SYSTEM {_quoted(system)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops if spellable(stop)]
    return "\n".join(lines) + "\n"


def spellable(text: str) -> bool:
    """Whether a Modelfile can hold it: its quotes cannot be escaped."""
    return '"""' not in text and not text.endswith('"')


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
