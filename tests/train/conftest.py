"""Jobs over random token ids, and a base model as a folder: pico with a tokenizer trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings, RunConfig, TrainSettings
from veneer.data.chat import Example
from veneer.train.job import Job
from veneer.train.loop import loop

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIGITS = "zero one two three four five six seven eight nine".split()


@pytest.fixture
def loud(pico: Any) -> Any:
    """pico with a head twenty times as large: the head of a random model is so small that no adapter could make it
    sure of anything."""
    pico.lm_head.weight.data *= 20
    return pico


@pytest.fixture
def examples() -> Callable[..., list[Example]]:
    """examples(n, seed): token ids under 96 of differing lengths, the second half trained on; few distinct
    completions, so that there is something to learn."""

    def make(n: int, seed: int = 0) -> list[Example]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for row in range(n):
            length = int(torch.randint(2, 9, (1,), generator=generator))
            prompt = torch.randint(3, 96, (length,), generator=generator).tolist()
            completion = [(7 * seed + k) % 90 + 3 for k in range(1 + length // 2)]
            flags = (False,) * length + (True,) * len(completion)
            made.append(Example(tuple(prompt + completion), flags, row, 0))
        return made

    return make


@pytest.fixture
def job() -> Callable[..., Job]:
    """job(model, slot, train, validation=(), lora={...}, **settings): attached to the model, at its start."""

    def make(
        model: Any, slot: str, train: Sequence, validation: Sequence = (), lora: dict | None = None, **given: Any
    ) -> Job:
        settings = TrainSettings(**{"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4, **given})
        attach(model, LoraSettings(**{"r": 4, **(lora or {})}), slot, seed=settings.seed)
        return Job(slot, settings, train, validation, settings.learning_rate, methods_of(model, slot))

    return make


@pytest.fixture
def run_loop() -> Callable[..., list[tuple[str, int, dict]]]:
    """run_loop(model, *jobs, watch=None): trains to the end; the facts as (slot, step, facts), `watch` sees each."""

    def run(
        model: Any, *jobs: Job, watch: Callable[[Job, dict], None] | None = None, ahead: bool = False
    ) -> list[tuple[str, int, dict]]:
        facts_of: list[tuple[str, int, dict]] = []

        def record(job: Job, facts: dict) -> None:
            facts_of.append((job.slot, facts["step"], facts))
            if watch is not None:
                watch(job, facts)

        loop(model, jobs, record=record, save=lambda jobs: None, ahead=ahead)
        return facts_of

    return run


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that `load` reads in a moment: 2 layers of width 32, tied embeddings, a ChatML tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"user assistant Write {' '.join(DIGITS)}"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("base") / "pico"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows of data: two digits -> their names."""
    file = tmp_path_factory.mktemp("data") / "digits.jsonl"
    names = [(f"Write {n:02d}", f"{DIGITS[n // 10]} {DIGITS[n % 10]}") for n in range(10, 90)]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in names))
    return file


@pytest.fixture
def config(pico_folder: Path, digits: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """config(**flat options): a run of 12 steps into tmp_path/out, with anything changed."""

    def make(**options: Any) -> RunConfig:
        given = {"base_model": str(pico_folder), "dataset": str(digits), "output_dir": str(tmp_path / "out")}
        short = {"max_steps": 12, "r": 4, "dtype": "float32", "learning_rate": 1e-2, "eval_steps": 4, "save_steps": 3}
        return RunConfig.from_flat({**given, **short, **options})

    return make


class Stop(BaseException):
    """As sudden as a signal: nothing in the package catches it."""


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig, int], None]:
    """stopping(config, n): trains and dies once step n is known (a GPU may have begun the next)."""
    from veneer.train import run

    def train(one: RunConfig, n: int) -> None:
        class Dying(run.Recorder):
            def __call__(self, job: Any, facts: dict) -> None:
                super().__call__(job, facts)
                if facts["split"] == "train" and facts["step"] == n:
                    raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(run, "Recorder", Dying)
            with pytest.raises(Stop):
                run.train(one, progress=False)

    return train
