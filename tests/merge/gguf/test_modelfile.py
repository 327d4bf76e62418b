"""Ollama's Modelfile: its template writes what the chat template writes, or is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.merge.gguf.conftest import tokenizer_cutting
from veneer.merge.gguf.modelfile import Layout, modelfile
from veneer.merge.gguf.ollama import write_modelfile

DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
FOLDED = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
LATEST = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '...' }}")


def written(tmp_path: Path, template: str | None, **more: Any) -> tuple[str, list[str]]:
    tokenizer = tokenizer_cutting("gpt-2")
    tokenizer.chat_template = template
    notes = write_modelfile(tmp_path, "./model.gguf", tokenizer, **more)
    return (tmp_path / "Modelfile").read_text(), notes


def test_the_template_is_go_of_the_chat_template(tmp_path: Path) -> None:
    text, notes = written(tmp_path, CHATML, system='Say "yes".', adapter="./adapter.gguf")
    assert notes == []
    assert text == (
        "FROM ./model.gguf\nADAPTER ./adapter.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """Say "yes"."""\nPARAMETER stop "<|im_end|>"\n'
    )


def test_a_system_prompt_of_the_template_stands_where_there_is_none(tmp_path: Path) -> None:
    text, notes = written(tmp_path, DEFAULT + CHATML)
    opening = '{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range'
    assert notes == [] and f'TEMPLATE """{opening}' in text and "SYSTEM" not in text


def test_a_start_token_opens_the_conversation(tmp_path: Path) -> None:
    text, notes = written(tmp_path, LLAMA3)  # this tokenizer puts none before a text, so the template has it
    assert notes == [] and 'TEMPLATE """<s>{{ range' in text and "]\n\n{{ .Content }}<|im_end|>{{ else" in text


def test_without_a_chat_template_the_layout_of_training_stands_there(tmp_path: Path) -> None:
    text, notes = written(tmp_path, None)
    assert notes == [] and '"user" }}{{ .Content }}\n{{ else' in text and 'PARAMETER stop "<|im_end|>"' in text


@pytest.mark.parametrize("template", [FOLDED, LATEST])
def test_what_is_more_than_words_around_each_role_is_left_out_and_said(tmp_path: Path, template: str) -> None:
    text, notes = written(tmp_path, template)
    assert "TEMPLATE" not in text and "no TEMPLATE" in notes[0]
    assert text == 'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_a_layout_writes_as_its_go_says() -> None:
    layout = Layout("S", ("s<", ">s"), ("u<", ">u"), ("a<", ">a"), "a<", "kind")
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    assert layout.text(talk) == "Ss<kind>su<1>ua<2>au<3>ua<"
    assert layout.text([{"role": "system", "content": "0"}, *talk]) == "Ss<0>su<1>ua<2>au<3>ua<"


@pytest.mark.parametrize("text", ['Say "yes"', 'a """ b'])
def test_what_a_modelfile_cannot_quote_is_left_out(text: str) -> None:
    assert "SYSTEM" not in modelfile("./model.gguf", None, None, text, [])
    assert 'SYSTEM """Say "yes" or no."""' in modelfile("./model.gguf", None, None, 'Say "yes" or no.', [])
