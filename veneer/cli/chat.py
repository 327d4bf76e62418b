"""`veneer chat`: a conversation in the terminal or from a pipe, with adapters to switch between."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from veneer.cli.generate import decoding
from veneer.cli.load import open_model
from veneer.cli.output import print_json, results, say
from veneer.cli.parse import Command, parse
from veneer.config import ChatSettings
from veneer.errors import nearest

if TYPE_CHECKING:
    from veneer.cli.load import Opened

BASE = "base"
COMMAND = Command(
    name="chat",
    summary="talk to the base and its adapters, switching live",
    settings=ChatSettings,
    positional="adapters",
    example="veneer chat polite=out/polite,short=out/short",
)


def run(argv: Sequence[str]) -> int:
    """Read, answer, until /quit or the end of the input."""
    parsed = parse(argv, COMMAND)
    settings = parsed.settings
    session = Session(open_model(settings, settings.adapters), settings)
    say(f"{session.who()}\n{session.help()}")
    for line in _lines(session):
        if not session.take(line, sys.stderr if parsed.json else results()):
            break
    if parsed.json:
        print_json({"base_model": session.opened.loaded.name, "turns": session.turns})
    return 0


@dataclass
class Session:
    """Who speaks, what was said. A conversation goes on when the speaker changes; /reset starts another."""

    opened: Opened
    settings: ChatSettings
    speaker: str = ""
    system_prompt: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.speaker = next(iter(self.settings.adapters), BASE)
        self.system_prompt = self.settings.system_prompt

    def take(self, line: str, out: Any) -> bool:
        """One line of input: a command or something to answer. False: the user wants to leave."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._answer(line, out)
            return True
        word, _, rest = line[1:].strip().partition(" ")
        if word in ("quit", "exit", "q"):
            return False
        if word in COMMANDS:
            say(COMMANDS[word][1](self, rest.strip()))
        else:
            say(f"unknown command /{word}{_hint(word, COMMANDS, '/')}\n{self.help()}")
        return True

    def use(self, name: str) -> str:
        if name != BASE and name not in self.settings.adapters:
            return f"no adapter {name or 'given'}{_hint(name, self.settings.adapters)}\n{self.who()}"
        self.speaker = name
        return self.who()

    def who(self, _: str = "") -> str:
        names = [BASE, *self.settings.adapters]
        marked = ", ".join(f"*{name}" if name == self.speaker else name for name in names)
        return f"{self.opened.loaded.name}: {marked} (* speaks)"

    def reset(self, _: str = "") -> str:
        self.messages.clear()
        return "a new conversation"

    def system(self, text: str) -> str:
        self.system_prompt = text or None
        return f"system prompt: {text}" if text else "the system prompt that each adapter was trained with"

    def help(self, _: str = "") -> str:
        return "\n".join(f"  {usage:<14} {about}" for usage, _, about in COMMANDS.values()) + "\n  /quit"

    def _answer(self, text: str, out: Any) -> None:
        """Stream the answer with the speaker's name before every line; Ctrl-C ends the answer, not the chat."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            _write(out, f"[{self.speaker}] ")
            for piece in self._stream():
                pieces.append(piece)
                _write(out, piece.replace("\n", f"\n[{self.speaker}] "))
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            _write(out, " (stopped)")
        _write(out, "\n")
        reply = "".join(pieces)
        self.messages.append({"role": "assistant", "content": reply})
        self.turns.append({"adapter": self.speaker, "user": text, "reply": reply})

    def _stream(self) -> Iterator[str]:
        from veneer.data.chat import Conversation
        from veneer.model.generate import stream

        slot, loaded = None if self.speaker == BASE else self.speaker, self.opened.loaded
        conversation = Conversation(tuple(self.messages), (), "messages")
        prompt_ids = self.opened.prompt_ids(conversation, slot, self.system_prompt)
        return stream(loaded.model, self.opened.tokenizer(slot), prompt_ids, slot=slot, **decoding(self.settings))


COMMANDS: dict[str, tuple[str, Callable[[Session, str], str], str]] = {
    "use": ("/use NAME", Session.use, "another adapter goes on with the conversation"),
    "base": ("/base", lambda session, _: session.use(BASE), "the base goes on with the conversation"),
    "adapters": ("/adapters", Session.who, "who can speak"),
    "reset": ("/reset", Session.reset, "forget what was said"),
    "system": ("/system TEXT", Session.system, "set the system prompt; without TEXT: each adapter's own"),
    "help": ("/help", Session.help, "this list"),
}
"""Command -> (usage, what it does, one line about it). Each returns what to say."""


def _lines(session: Session) -> Iterator[str]:
    """Lines of the input; a prompt where someone types them."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and remembers them
    while True:
        try:
            # input() edits lines only when it writes to the real standard output.
            with contextlib.redirect_stdout(results()):
                yield input(f"({session.speaker}) > ")
        except EOFError:
            return


def _hint(word: str, choices: Any, mark: str = "") -> str:
    near = nearest(word, choices, 1)
    return f"; did you mean {mark}{near[0]}?" if near else ""


def _write(out: Any, text: str) -> None:
    print(text, end="", file=out, flush=True)
