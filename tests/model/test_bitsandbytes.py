"""NF4 checkpoints in both directions: what bitsandbytes wrote is read here, what is written here it reads."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.model.test_load import SIZES, words
from tests.model.test_load_quantised import LAYERS, leaves_of, logits_of, made, refused, written
from veneer.adapter.attach import attach, detach
from veneer.config import LoraSettings
from veneer.model.load import load

DOUBLE = pytest.mark.parametrize("double", [False, True])
STORAGE = {False: "nf4", True: "nf4-dq"}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


# Rows of whole blocks of 64: on the CPU bitsandbytes 0.50 decodes other rows wrongly.
LARGER = SIZES | {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings."""
    config = LlamaConfig(**LARGER, initializer_range=0.3, tie_word_embeddings=True)
    return written(tmp_path_factory.mktemp("bnb") / "llama", made(LlamaForCausalLM, config))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases in q, k and v, a head of its own."""
    model = made(Qwen2ForCausalLM, Qwen2Config(**LARGER, initializer_range=0.3, tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return written(tmp_path_factory.mktemp("bnb") / "qwen", model)


def read_by_transformers(folder: Path, dtype: torch.dtype, **config: Any) -> Any:
    """transformers with bitsandbytes, on the CPU.

    In training mode, which changes nothing else in these families: in the other, bitsandbytes repacks the weight at
    the first call, for a kernel that rounds its magnitudes to bfloat16 and wants rows of whole blocks.
    """
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **config)} if config else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **options).train()


def ours(folder: Path, to: Path, double: bool) -> Any:
    """A checkpoint in four bits written from here; the model that wrote it."""
    loaded = load(str(folder), "float32", storage=STORAGE[double])
    loaded.model.save_pretrained(to, max_shard_size="30KB")
    loaded.tokenizer.save_pretrained(to)
    return loaded.model


# Ours, read here: without bitsandbytes.


@DOUBLE
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_what_is_written_here_is_read_here(
    family: str, double: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = ours(request.getfixturevalue(family), tmp_path / "packed", double)
    for asked in ("dense", STORAGE[double]):
        again = load(str(tmp_path / "packed"), "float32", storage=asked)
        assert again.storage == f"{STORAGE[double]} float32"
        assert torch.equal(logits_of(again.model), logits_of(model))


def test_another_storage_than_that_of_the_files(llama: Path, tmp_path: Path) -> None:
    ours(llama, tmp_path / "packed", False)
    refused(tmp_path / "packed", "stored as nf4", "int8 was asked", "original model", storage="int8")


def test_double_quantisation_is_what_the_files_have(llama: Path, tmp_path: Path) -> None:
    ours(llama, tmp_path / "nf4", double=False)
    with pytest.warns(UserWarning, match="nf4 is stored as nf4 and loads as that, not as nf4-dq"):
        loaded = load(str(tmp_path / "nf4"), "float32", storage="nf4-dq")
    assert loaded.storage.startswith("nf4 ")


def test_files_that_are_not_packed_as_their_config_says(llama: Path, tmp_path: Path) -> None:
    ours(llama, tmp_path / "nf4", double=False)
    shutil.copytree(llama, tmp_path / "dense")
    shutil.copy(tmp_path / "nf4" / "config.json", tmp_path / "dense" / "config.json")
    refused(tmp_path / "dense", "dense", "says that it is quantised", "hold no packed layer", "Next: ")


def test_an_adapter_is_not_saved_with_the_base(llama: Path, tmp_path: Path) -> None:
    model = load(str(llama), "float32", storage="nf4").model
    attach(model, LoraSettings(r=2))
    model.save_pretrained(tmp_path / "with")
    detach(model)
    model.save_pretrained(tmp_path / "without")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]


def damaged(llama: Path, tmp_path: Path, part: str, value: torch.Tensor | None) -> Path:
    ours(llama, tmp_path / "packed", False)
    name = f"model.layers.1.mlp.up_proj.weight{part}"
    index = json.loads((tmp_path / "packed/model.safetensors.index.json").read_text())
    shard = tmp_path / "packed" / index["weight_map"][name]
    state = load_file(shard)
    del state[name]
    if value is not None:
        state[name] = value
    save_file(state, shard, metadata={"format": "pt"})
    return tmp_path / "packed"


def test_a_packed_weight_of_another_size(llama: Path, tmp_path: Path) -> None:
    folder = damaged(llama, tmp_path, "", torch.zeros(7, 1, dtype=torch.uint8))
    refused(folder, r"layers\.1\.mlp\.up_proj\.weight in .*\.safetensors", r"got uint8 \(7, 1\)")


def test_a_packed_weight_without_its_magnitudes(llama: Path, tmp_path: Path) -> None:
    refused(damaged(llama, tmp_path, ".absmax", None), r"layers\.1\.mlp\.up_proj", "absmax")


def test_another_block_size(llama: Path, tmp_path: Path) -> None:
    text = json.dumps({"quant_type": "nf4", "blocksize": 128, "dtype": "float32", "shape": [128, 64]})
    state = torch.tensor(list(text.encode()), dtype=torch.uint8)
    folder = damaged(llama, tmp_path, ".quant_state.bitsandbytes__nf4", state)
    refused(folder, r"layers\.1\.mlp\.up_proj", "blocksize 128, wanted 64")


# bitsandbytes on the other side.


@needs_bitsandbytes
@DOUBLE
@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-2)])
def test_what_is_written_here_bitsandbytes_reads(
    family: str, double: bool, dtype: torch.dtype, error: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ours(request.getfixturevalue(family), tmp_path / "packed", double)
    theirs = read_by_transformers(tmp_path / "packed", dtype)
    kinds = [type(module).__name__ for module in theirs.modules()]
    assert kinds.count("Linear4bit") == LAYERS and kinds.count("Linear") == 1  # the head
    # bfloat16: theirs are products in float32 (bnb_4bit_compute_dtype), and weights of 0.3 amplify each rounding here
    mine = load(str(tmp_path / "packed"), str(dtype).removeprefix("torch.")).model
    wanted = logits_of(theirs)
    assert (logits_of(mine) - wanted).abs().max() < error * wanted.abs().max()


@needs_bitsandbytes
@DOUBLE
@pytest.mark.parametrize("options", [{}, {"llm_int8_skip_modules": ["lm_head", "up_proj"]}, {"quant_storage": "bf16"}])
def test_what_bitsandbytes_wrote_is_read_here(
    options: dict[str, Any],
    double: bool,
    llama: Path,
    tmp_path: Path,
) -> None:
    config = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    if "quant_storage" in options:
        config["bnb_4bit_quant_storage"] = torch.bfloat16
    else:
        config |= options
    theirs = read_by_transformers(llama, torch.float32, **config)
    theirs.save_pretrained(tmp_path / "theirs")
    words().save_pretrained(tmp_path / "theirs")
    loaded = load(str(tmp_path / "theirs"), "float32")
    assert loaded.storage == f"{STORAGE[double]} float32"
    assert len(leaves_of(loaded.model)) == (LAYERS - 2 if "llm_int8_skip_modules" in options else LAYERS)
    wanted = logits_of(theirs)
    assert (logits_of(loaded.model) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    if options:
        return
    loaded.model.save_pretrained(tmp_path / "again")  # byte for byte the same tensors
    with (
        safe_open(tmp_path / "theirs/model.safetensors", "pt") as first,
        safe_open(tmp_path / "again/model.safetensors", "pt") as second,
    ):
        assert set(first.keys()) == set(second.keys())
        for name in first.keys():  # noqa: SIM118, not a dict
            if "quant_state" not in name:
                assert torch.equal(first.get_tensor(name), second.get_tensor(name)), name


@needs_bitsandbytes
def test_bitsandbytes_is_not_needed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would refuse the folder."""
    ours(llama, tmp_path / "packed", True)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    shutil.rmtree(tmp_path / "nothing", ignore_errors=True)
    assert load(str(tmp_path / "packed")).storage.startswith("nf4-dq")
