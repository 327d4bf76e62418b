"""llama.cpp itself reads what was written, and speaks as base and adapter do here: by tokens, and by logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.merge.gguf.conftest import MODELS, save_adapter
from veneer.adapter.attach import attach, detach
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.cli.__main__ import main
from veneer.config import LoraSettings
from veneer.merge.agreement import sample_prompts
from veneer.merge.gguf.model_file import write_model
from veneer.merge.gguf.splitting import SPLITTINGS
from veneer.model.load import load

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

TEXT = "Write 42: it's 12345 people,  don't\n\n know été 你好 that! \t x"
# llama.cpp keeps keys and values in float16, 11 bits: at logits of about 7, a few thousandths. What a test wants to see
# (a row in the wrong place, a lost scale) is as large as the logits.
CLOSE = 0.05


@contextmanager
def speaker(file: Path, adapter: Path | None = None) -> Iterator[Any]:
    options = {"n_threads": 1, "n_threads_batch": 1}  # more would wait for each other on a busy machine
    lora = {"lora_path": str(adapter)} if adapter else {}
    made = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False, **options, **lora)
    try:
        yield made
    finally:
        made.close()


def logits_of(model: Any, ids: list[int]) -> Tensor:
    model.reset()
    model.eval(ids)
    return torch.tensor(np.array(model.scores[: len(ids)]))


def base_file(base: str | Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    loaded = load(str(base), "float32", device="cpu", check=False)
    detach(loaded.model)
    folder.mkdir()
    write_model(folder, loaded.model.to(dtype), loaded.tokenizer, loaded.model.veneer_source)
    return folder / "model.gguf"


@torch.no_grad()
def adapted(base: Path, adapter: Path, ids: list[int]) -> Tensor:
    model = attach(load(str(base), "float32", device="cpu").model, Adapter.load(adapter))
    return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", MODELS)
def test_merged_and_beside_its_base_it_speaks_as_here(
    model_folder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    base = model_folder(name)
    # other ranks and alphas in some layers: one alpha a file has to do for all
    patterns = {"rank_pattern": {"q_proj": 3, "down_proj": 7}, "alpha_pattern": {"k_proj": 5}}
    adapter = save_adapter(base, tmp_path / "adapter", **patterns)
    merged = ["merge", adapter, "--into-base", "--format", "gguf", "-o", tmp_path / "merged"]
    beside = ["convert", adapter, tmp_path / "beside", "--to", "gguf"]
    assert [main([str(word) for word in words]) for words in (merged, beside)] == [0, 0]
    ids = load(str(base), "float32").tokenizer(TEXT)["input_ids"]
    wanted, file = adapted(base, adapter, ids), base_file(base, tmp_path / "base")
    with speaker(file) as model:
        assert (logits_of(model, ids) - wanted).abs().max() > 20 * CLOSE, "the adapter does next to nothing"
    for files in [(tmp_path / "merged" / "model.gguf",), (file, tmp_path / "beside" / "adapter.gguf")]:
        with speaker(*files) as model:
            got = logits_of(model, ids)
        assert (got - wanted).abs().max() < CLOSE
        assert (got.argmax(-1) == wanted.argmax(-1)).double().mean() >= 0.99


def test_embedding_and_head_of_an_untied_base(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = model_folder("llama3")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules="embed_tokens,lm_head,q_proj")
    assert main(["convert", str(adapter), str(tmp_path / "beside"), "--to", "gguf"]) == 0
    ids = load(str(base), "float32").tokenizer(TEXT)["input_ids"]
    with speaker(base_file(base, tmp_path / "base"), tmp_path / "beside" / "adapter.gguf") as model:
        assert (logits_of(model, ids) - adapted(base, adapter, ids)).abs().max() < CLOSE


@pytest.mark.parametrize("cutting", SPLITTINGS.values())
def test_texts_become_the_same_tokens(model_folder: Callable[..., Path], tmp_path: Path, cutting: str) -> None:
    base = model_folder("llama", cutting)
    tokenizer = load(str(base), "float32").tokenizer
    with speaker(base_file(base, tmp_path / "base")) as model:
        for text in (
            TEXT,
            "<|im_start|>user\nIt's 2024<|im_end|>\n",
            "  \n\n a\u00a0b '\u2019s I'LL 1 234567890 %$# été\n",
        ):
            assert model.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text)["input_ids"]
        assert model.metadata["tokenizer.chat_template"] == tokenizer.chat_template
        assert (model.token_bos(), model.token_eos()) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_added_tokens_are_read_as_such(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = model_folder("llama")
    loaded = load(str(base), "float32", device="cpu")
    take(attach(loaded.model, LoraSettings(r=2, add_tokens=["<call>", "<end>"]))).save(tmp_path / "adapter")
    words = [
        "merge",
        tmp_path / "adapter",
        "--base-model",
        base,
        "--into-base",
        "--format",
        "gguf",
        "-o",
        tmp_path / "m",
    ]
    assert main([str(word) for word in words]) == 0
    first = len(loaded.tokenizer)
    with speaker(tmp_path / "m" / "model.gguf") as model:
        assert model.tokenize(b"<call><end>", add_bos=False, special=True) == [first, first + 1]


@pytest.mark.slow
def test_smollm2_by_tokens(smollm2: Any, tmp_path: Path) -> None:
    """Teacher-forced argmax at F16, merged and beside the base: at least 99 % of all positions."""
    model, tokenizer = smollm2
    plain = take(attach(model, LoraSettings(r=8), "gguf", seed=1), "gguf", base_name="smollm2")
    detach(model, "gguf")
    generator = torch.Generator().manual_seed(2)
    tensors = dict(plain.tensors)
    for name in (name for name in tensors if name.endswith(".b")):
        tensors[name] = 0.1 * torch.randn(tensors[name].shape, generator=generator)
    Adapter(tensors, plain.card).save(tmp_path / "adapter")
    samples = [sample[0].tolist() for sample in sample_prompts(tokenizer)[:3]]
    before = _choices(model, samples)
    attach(model, Adapter.load(tmp_path / "adapter"), "gguf")
    wanted = _choices(model, samples)
    detach(model, "gguf")
    assert len(wanted) > 100 and (wanted == before).double().mean() < 0.9, "the adapter does next to nothing"
    merged = ["merge", "--into-base", "--format", "gguf", "--dtype", "float16", "-o", str(tmp_path / "merged")]
    assert main([*merged, str(tmp_path / "adapter")]) == 0
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "beside"), "--to", "gguf"]) == 0
    base = base_file("smollm2", tmp_path / "base", torch.float16)
    for files in [(tmp_path / "merged" / "model.gguf",), (base, tmp_path / "beside" / "adapter.gguf")]:
        with speaker(*files) as other:
            assert other.tokenize(TEXT.encode(), add_bos=False, special=True) == tokenizer(TEXT)["input_ids"]
            got = torch.cat([logits_of(other, ids).argmax(-1) for ids in samples])
        assert (got == wanted).double().mean() >= 0.99


@torch.no_grad()
def _choices(model: Any, samples: list[list[int]]) -> Tensor:
    """The likeliest token at every position."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0].argmax(-1) for ids in samples])
