"""`veneer chat` from a pipe, around a stand-in for the model."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest


@pytest.fixture
def chat(veneer: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def talk(*lines: str, words: tuple[str, ...] = ("polite=out/a,short=out/b",)) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return veneer("chat", *words)

    return talk


def test_the_first_adapter_speaks_first_and_others_on_request(chat: Any, model: Any) -> None:
    answer = chat("one", "/use short", "two", "/base", "three")
    assert answer.code == 0
    assert answer.out.splitlines() == [
        "[polite] polite hears one",
        "[short] short hears two",
        "[base] base hears three",
    ]
    assert model.slots == {"polite": "out/a", "short": "out/b"}


def test_the_conversation_goes_on_until_reset(chat: Any, model: Any) -> None:
    chat("one", "/use short", "two", "/reset", "three")
    assert [len(asked["messages"]) for asked in model.asked] == [1, 3, 1]
    assert model.asked[1]["messages"][1] == {"role": "assistant", "content": "polite hears one"}


def test_every_line_of_a_reply_names_its_speaker(chat: Any, model: Any) -> None:
    model.say = lambda *_: "a\nb"
    assert chat("x").out == "[polite] a\n[polite] b\n"


def test_system_prompt(chat: Any, model: Any) -> None:
    chat("a", "/system be brief", "b", "/system", "c", words=("--base-model", "m", "--system-prompt", "start"))
    systems = [[m["content"] for m in asked["messages"] if m["role"] == "system"] for asked in model.asked]
    assert systems == [["start"], ["be brief"], []]


def test_the_system_prompt_of_the_training_is_the_default(chat: Any, model: Any) -> None:
    chat("a", "/base", "b", "/use x", "/system other", "c", "/system", "d", words=("x=out/prompted",))
    systems = [[m["content"] for m in asked["messages"] if m["role"] == "system"] for asked in model.asked]
    assert systems == [["as trained"], [], ["other"], ["as trained"]]


def test_adapters_are_listed_and_the_speaker_marked(chat: Any) -> None:
    answer = chat("/use short", "/adapters")
    assert answer.out == ""
    assert answer.err.splitlines()[-1] == "smollm2: base, polite, *short (* speaks)"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/use shrt", "no adapter shrt; did you mean short?"),
        ("/use", "no adapter given"),
        ("/rest", "unknown command /rest; did you mean /reset?"),
        ("/", "unknown command /"),
        ("/help", "/use NAME"),
    ],
)
def test_a_slip_does_not_end_the_chat(chat: Any, line: str, told: str) -> None:
    answer = chat(line, "still here?")
    assert told in answer.err
    assert answer.out == "[polite] polite hears still here?\n"


@pytest.mark.parametrize("leave", ["/quit", "/exit", "/q"])
def test_quit(chat: Any, leave: str) -> None:
    assert chat("", "  ", leave, "never said").out == ""


def test_json_is_the_whole_conversation(chat: Any) -> None:
    answer = chat("one", "/base", "two", words=("polite=out/a", "--json"))
    assert json.loads(answer.out) == {
        "base_model": "smollm2",
        "turns": [
            {"adapter": "polite", "user": "one", "reply": "polite hears one"},
            {"adapter": "base", "user": "two", "reply": "base hears two"},
        ],
    }
    assert "[polite] polite hears one" in answer.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_interrupted_reply_ends_the_reply_only(chat: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    say = model.say

    def interrupt_once(*args: Any) -> str:
        model.say = say
        raise KeyboardInterrupt

    model.say = interrupt_once
    lines = iter(["one", "two", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(io, "StringIO", Terminal)
    answer = chat()
    assert answer.code == 0
    assert answer.out == "[polite]  (stopped)\n[polite] polite hears two\n"


def test_an_interrupted_reply_in_a_pipe_ends_the_chat(chat: Any, model: Any) -> None:
    def interrupt(*args: Any) -> str:
        raise KeyboardInterrupt

    model.say = interrupt
    assert chat("one").code == 130
