"""`veneer data preview`: what the model will see of a data file."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.cli.output import print_json, results
from veneer.cli.parse import Command, parse
from veneer.config import PreviewSettings
from veneer.errors import ConfigError

COMMAND = Command(
    name="data preview",
    summary="the template applied, tokens coloured by whether they are trained on, truncation counted",
    settings=PreviewSettings,
    positional="dataset",
    example="veneer data preview train.jsonl --base-model smollm2",
)


def run(argv: Sequence[str]) -> int:
    """`preview` is the only word after `data` so far."""
    if argv and argv[0] == "preview":
        return _preview(argv[1:])
    if {"--help", "-h"} & set(argv):
        return _preview(["--help"])
    raise ConfigError(f"data {argv[0] if argv else 'alone'} is not a command; write veneer data preview FILE.jsonl")


def _preview(argv: Sequence[str]) -> int:
    parsed = parse(argv, COMMAND)
    settings = parsed.settings
    from veneer.data.chat import Template
    from veneer.data.encode import encode
    from veneer.data.preview import preview, summary
    from veneer.data.sources import read_source
    from veneer.model.added_tokens import extended
    from veneer.model.load import load_tokenizer

    source = read_source(settings.dataset, settings.columns)
    tokenizer = load_tokenizer(settings.base_model)
    if settings.add_tokens:
        tokenizer = extended(tokenizer, settings.add_tokens).tokenizer
    template = Template(tokenizer, settings.system_prompt)
    encoded = encode(source.rows, template, settings.max_length, settings.dataset)
    if parsed.json:
        print_json(summary(encoded))
    else:
        _show(preview(encoded, tokenizer, settings.n))
    return 0


def _show(renderable: object) -> None:
    from rich.console import Console

    Console(file=results(), highlight=False).print(renderable)
