"""Stand-ins for what the verbs call, so that a test needs neither torch nor a model."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from veneer.cli.__main__ import main

Stub = Callable[..., types.ModuleType]


@dataclass
class Answer:
    """What a command line gave back."""

    code: int
    out: str
    err: str


@pytest.fixture
def veneer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs a command line in this process."""

    def run(*words: object) -> Answer:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as left:
            code = int(str(left.code or 0))
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Puts a module with these names in the place of the real one."""

    def put(module: str, **names: Any) -> types.ModuleType:
        stand_in = types.ModuleType(module)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return stand_in

    return put


@dataclass
class Model:
    """A base whose text is `slot: last message` and which remembers what it was asked."""

    name: str = "smollm2"
    storage: str = "dense"
    slots: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def say(self, prompt: tuple[dict[str, str], ...], slot: str | None, options: dict[str, Any]) -> str:
        self.asked.append({"messages": list(prompt), "slot": slot, **options})
        return f"{slot or 'base'} hears {prompt[-1]['content']}"


@pytest.fixture
def model(stub: Stub) -> Model:
    """The stand-in for loading, attaching, templates and generation."""
    base = Model()

    class Adapter:
        def __init__(self, folder: str) -> None:
            self.folder = folder
            training = {"options": {"system_prompt": "as trained"}} if "prompted" in folder else {}
            base_name, prompt = (
                None if "nameless" in folder else "smollm2",
                training.get("options", {}).get("system_prompt"),
            )
            self.card = types.SimpleNamespace(base_name=base_name, training=training, system_prompt=prompt)

        load = classmethod(lambda cls, folder: cls(folder))

    class Template:
        def __init__(self, tokenizer: Any, system_prompt: str | None = None) -> None:
            self.system = ({"role": "system", "content": system_prompt},) if system_prompt else ()

        def prompt_ids(self, conv: Any) -> tuple[dict[str, str], ...]:
            messages = conv.messages
            return self.system + (messages[:-1] if messages[-1]["role"] == "assistant" else messages)

    def load(name: str, dtype: str, storage: str) -> Any:
        base.name, base.storage = name, storage
        print("a library that prints to standard output")
        return types.SimpleNamespace(model=base, tokenizer=None, name=name, storage=f"{storage} {dtype}")

    def attach(to: Model, adapter: Adapter, name: str) -> None:
        to.slots[name] = adapter.folder

    def stream(to: Model, tokenizer: Any, prompt: Any, slot: str | None, **options: Any) -> Iterator[str]:
        yield from to.say(prompt, slot, options).split(sep=" ", maxsplit=0)

    def generate(to: Model, tokenizer: Any, prompts: Any, slot: str | None, **options: Any) -> list[str]:
        return [to.say(prompt, slot, options) for prompt in prompts]

    stub("veneer.adapter.card", Adapter=Adapter)
    stub("veneer.adapter.attach", attach=attach)
    stub("veneer.adapter.take", storage_note=lambda adapter, storage, name: None)
    stub("veneer.model.load", load=load)
    stub("veneer.model.generate", stream=stream, generate=generate)
    import veneer.data.chat as real

    stub("veneer.data.chat", Template=Template, Conversation=real.Conversation, conversation=real.conversation)
    return base
