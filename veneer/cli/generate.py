"""`veneer generate`: text from the base or an adapter, streamed where there is one answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from veneer.cli.load import open_model
from veneer.cli.output import print_json, results
from veneer.cli.parse import Command, parse
from veneer.config import DecodingSettings, GenerateSettings

if TYPE_CHECKING:
    from veneer.cli.load import Opened
    from veneer.data.chat import Conversation

SLOT = "adapter"
COMMAND = Command(
    name="generate",
    summary="text from the base or an adapter",
    settings=GenerateSettings,
    positional="prompt",
    example='veneer generate "What is a veneer?" --adapter out/skill',
)


def run(argv: Sequence[str]) -> int:
    """Answer one prompt, or every row of a file."""
    parsed = parse(argv, COMMAND)
    settings = parsed.settings
    conversations = _conversations(settings)
    opened = open_model(settings, {SLOT: settings.adapter} if settings.adapter else {})
    if settings.dataset is None and settings.num_return_sequences == 1 and not parsed.json:
        _stream(opened, settings, conversations[0])
        return 0
    answers = _answers(opened, settings, conversations)
    if parsed.json:
        print_json({"base_model": opened.loaded.name, "adapter": settings.adapter, "answers": answers})
    for answer in () if parsed.json else answers:
        _print(answer, rows=settings.dataset is not None)
    return 0


def decoding(settings: DecodingSettings) -> dict[str, Any]:
    """The arguments that `generate` and `stream` share."""
    return {name: getattr(settings, name) for name in DecodingSettings.model_fields}


def _conversations(settings: GenerateSettings) -> list[Conversation]:
    from veneer.data.chat import Conversation, conversation
    from veneer.data.sources import read_source

    if settings.dataset is None:
        text = sys.stdin.read().rstrip("\n") if settings.prompt == "-" else settings.prompt
        return [Conversation(({"role": "user", "content": text},), (), "messages")]
    rows = read_source(settings.dataset, settings.columns, settings.limit).rows
    return [conversation(row, f"{settings.dataset}, row {number}") for number, row in enumerate(rows, start=1)]


def _stream(opened: Opened, settings: GenerateSettings, conversation: Conversation) -> None:
    from veneer.model.generate import stream

    loaded, slot = opened.loaded, SLOT if settings.adapter else None
    prompt_ids = opened.prompt_ids(conversation, slot, settings.system_prompt)
    for piece in stream(loaded.model, opened.tokenizer(slot), prompt_ids, slot=slot, **decoding(settings)):
        print(piece, end="", file=results(), flush=True)
    print(file=results(), flush=True)


def _answers(opened: Opened, settings: GenerateSettings, conversations: list[Conversation]) -> list[dict[str, Any]]:
    """One object a prompt; the answers of one prompt differ by the seed, counted up from the one given."""
    from veneer.model.generate import generate

    loaded, slot = opened.loaded, SLOT if settings.adapter else None
    prompts = [opened.prompt_ids(conversation, slot, settings.system_prompt) for conversation in conversations]
    options = {**decoding(settings), "batch_size": settings.batch_size}
    runs = []
    for number in range(settings.num_return_sequences):
        options["seed"] = settings.seed + number
        runs.append(generate(loaded.model, opened.tokenizer(slot), prompts, slot=slot, **options))
    said = [_last_user(conversation) for conversation in conversations]
    return [{"row": i, "prompt": text, "texts": [r[i] for r in runs]} for i, text in enumerate(said)]


def _last_user(conversation: Conversation) -> str:
    turns = [message["content"] for message in conversation.messages if message["role"] == "user"]
    return turns[-1] if turns else ""


def _print(answer: dict[str, Any], rows: bool) -> None:
    """A row as a line of JSON (a text may hold line ends), the answers to a prompt as they are."""
    if rows:
        print_json(answer)
    else:
        print(*answer["texts"], sep="\n---\n", file=results())
