"""Loading into a quantised storage: the values, the memory on the way, and one clear ModelError for what is wrong."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.model.test_load import SIZES, words
from veneer.adapter.attach import attach, detach, merge_into
from veneer.adapter.take import storage_note, take
from veneer.bases import BASES
from veneer.config import SWITCHES, LoraSettings
from veneer.errors import ModelError, NotMergeable
from veneer.model.leaf import Leaf
from veneer.model.load import load
from veneer.model.packed import hidden_states, running
from veneer.model.quantised import storage_class
from veneer.model.stream import pack

ON_CPU = [storage for storage in BASES if storage not in ("dense", "fp8")]
IDS = torch.arange(3, 23)[None]
LAYERS = 14  # linear layers of SIZES' two


def test_layers_that_are_stored_transposed_are_refused_and_not_left_dense(tmp_path):
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, bos_token_id=94, eos_token_id=95)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel.*Conv1D.*nf4 was asked for.*leave the storage option out"):
        load(str(tmp_path), storage="nf4", progress=False)
    assert load(str(tmp_path), progress=False).storage.startswith("dense")


def written(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    words().save_pretrained(folder)
    return folder


def made(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, many shards."""
    config = LlamaConfig(**SIZES, initializer_range=0.3, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("q") / "llama"
    return written(folder, made(LlamaForCausalLM, config), max_shard_size="12KB")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases in q, k and v, a head of its own."""
    config = Qwen2Config(**SIZES, initializer_range=0.3, tie_word_embeddings=False)
    model = made(Qwen2ForCausalLM, config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return written(tmp_path_factory.mktemp("q") / "qwen", model, max_shard_size="12KB")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def leaves_of(model: nn.Module) -> dict[str, Leaf]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Leaf)}


def refused(folder: Path, *parts: str, storage: str = "nf4", **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(str(folder), storage=storage, **options)
    text = str(caught.value)
    for part in parts:
        assert re.search(part, text, re.DOTALL | re.IGNORECASE), f"{part!r} is not in: {text}"
    assert len(text) < 1500
    return text


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


# What comes out.


@pytest.mark.parametrize("storage", ON_CPU)
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_it_is_the_dense_model_with_every_linear_weight_encoded(
    family: str, storage: str, request: pytest.FixtureRequest
) -> None:
    """The reference: transformers' model whose linear weights were encoded and decoded one by one."""
    folder = request.getfixturevalue(family)
    loaded = load(str(folder), "float32", storage=storage)
    assert loaded.storage == f"{storage} float32"
    leaves = leaves_of(loaded.model)
    assert len(leaves) == LAYERS and {leaf.base.storage for leaf in leaves.values()} == {storage}
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for path, leaf in leaves.items():
        wanted = storage_class(storage).from_weight(own.get_submodule(path).weight.detach())
        assert torch.equal(leaf.base.dense(), wanted.dense()), path
        bias = own.get_submodule(path).bias
        assert (leaf.bias is None) == (bias is None) and (bias is None or torch.equal(leaf.bias, bias)), path
        own.get_submodule(path).weight.data.copy_(wanted.dense())
    assert torch.allclose(logits_of(loaded.model), logits_of(own), atol=1e-4 * logits_of(own).abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_what_is_not_a_linear_layer_stays_as_in_the_files(family: str, request: pytest.FixtureRequest) -> None:
    """Embeddings, head (tied or not), norms, and the buffers that no file holds."""
    folder = request.getfixturevalue(family)
    model, own = load(str(folder), "float32", storage="nf4").model, load(str(folder), "float32").model
    assert type(model.get_output_embeddings()) is nn.Linear
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family == "llama")
    buffers = dict(own.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    for name, value in [*own.named_parameters(), *buffers.items()]:
        if "_proj" not in name:
            assert torch.equal(value, model.get_parameter(name) if name not in buffers else model.get_buffer(name))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_siblings_know_each_other_in_the_models_order(llama: Path) -> None:
    leaves = leaves_of(load(str(llama), storage="nf4").model)
    names = [leaf.path.rpartition(".")[2] for leaf in leaves["model.layers.1.self_attn.q_proj"].siblings]
    assert names == ["q_proj", "k_proj", "v_proj"]


def test_the_fingerprint_is_that_of_the_files(llama: Path) -> None:
    assert load(str(llama), storage="nf4").fingerprint == load(str(llama)).fingerprint


def test_no_two_dense_weights_are_alive_at_once(llama: Path) -> None:
    kind = storage_class("nf4")
    alive: list[weakref.ref] = []
    most = 0

    def from_weight(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        nonlocal most
        most = max(most, 1 + sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(weight))
        return real(weight, bias)

    real = kind.from_weight
    with mock.patch.object(kind, "from_weight", from_weight):
        load(str(llama), storage="nf4")
    assert len(alive) == LAYERS and most == 1


def test_a_checkpoint_of_the_model_inside_the_head(llama: Path, tmp_path: Path) -> None:
    """Names without the prefix `model.`: transformers adds it."""
    AutoModelForCausalLM.from_pretrained(llama).model.save_pretrained(tmp_path / "inner")
    words().save_pretrained(tmp_path / "inner")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "inner" / "config.json").write_text(json.dumps(config))
    inner, outer = load(str(tmp_path / "inner"), storage="nf4").model, load(str(llama), storage="nf4").model
    assert torch.equal(logits_of(inner), logits_of(outer))


def test_another_family(tmp_path: Path) -> None:
    """GPT-NeoX: one fused query_key_value, biases everywhere, LayerNorm."""
    sizes = {name: SIZES[name] for name in SIZES if name != "num_key_value_heads"}
    config = GPTNeoXConfig(**sizes, initializer_range=0.3, rotary_pct=1.0)
    written(tmp_path / "neox", made(AutoModelForCausalLM.from_config, config))
    model = load(str(tmp_path / "neox"), "float32", storage="nf4").model
    assert len(leaves_of(model)) == 8 and logits_of(model).isfinite().all()


# Adapters on it.


@pytest.mark.parametrize("storage", ON_CPU)
def test_an_adapter_learns_and_comes_off_again(llama: Path, storage: str) -> None:
    loaded = load(str(llama), "float32", storage=storage)
    model, before = loaded.model, logits_of(loaded.model)
    attach(model, LoraSettings(r=4))
    assert torch.equal(logits_of(model), before)
    stream = pack([IDS[0].tolist(), IDS[0, :7].tolist()], slots=["default"] * 2)
    with running(model, stream):
        hidden_states(model).float().square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if ".slots." in name and name.endswith("b_OR")]
    assert len(gradients) == LAYERS and all(g is not None and g.abs().sum() > 0 for g in gradients)
    adapter = take(model)
    assert adapter.card.storage == f"{storage} float32"
    detach(model)
    assert len(leaves_of(model)) == LAYERS and torch.equal(logits_of(model), before)


def test_the_start_does_not_depend_on_the_storage(llama: Path) -> None:
    adapters = [take(attach(load(str(llama), storage=s).model, LoraSettings(r=2))) for s in ("dense", "nf4")]
    assert all(torch.equal(adapters[0].tensors[name], adapters[1].tensors[name]) for name in adapters[0].tensors)


def test_an_adapter_of_one_storage_fits_the_other_with_a_note(llama: Path, recwarn: pytest.WarningsRecorder) -> None:
    adapter = take(attach(load(str(llama), "float32", storage="nf4").model, LoraSettings(r=2)))
    dense = load(str(llama), "float32")
    attach(dense.model, adapter)
    assert not recwarn.list
    assert re.search(
        r"skill.*nf4 float32.*dense float32.*--load-in-4bit", storage_note(adapter, dense.storage, "skill")
    )
    assert storage_note(adapter, "nf4 bfloat16", "skill") is None


def test_every_storage_has_switches() -> None:
    assert set(BASES) - {"dense"} <= set(SWITCHES)


def test_merging_in_memory_would_round_the_update_away(llama: Path) -> None:
    model = attach(load(str(llama), storage="nf4").model, LoraSettings(r=2))
    with pytest.raises(NotMergeable, match=r"stored as nf4.*--into-base"):
        merge_into(model)


# What is refused.


def test_an_unknown_storage(llama: Path) -> None:
    refused(llama, "storage 'int3'", "dense, int8", storage="int3")


def test_nan_in_a_shard(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    state = load_file(shard)
    state[name][3, 4] = float("nan")
    save_file(state, shard, metadata={"format": "pt"})
    refused(folder, "nan", re.escape(name), shard.name)


def test_a_truncated_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(folder, shard.name, "truncated|incomplete", "download")


def test_a_shard_that_is_not_there(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.unlink()
    refused(folder, shard.name)


@pytest.fixture
def single(folder: Path) -> Path:
    """The same in one file."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder.parent / "one")
    words().save_pretrained(folder.parent / "one")
    return folder.parent / "one"


def changed(folder: Path, **tensors: torch.Tensor | None) -> Path:
    state = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        state.pop(name, None)
        if value is not None:
            state[name] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_linear_weight_that_is_missing(single: Path) -> None:
    refused(changed(single, **{"model.layers.1.mlp.up_proj.weight": None}), "missing", r"layers\.1\.mlp\.up_proj")


def test_another_weight_that_is_missing(single: Path) -> None:
    refused(changed(single, **{"model.norm.weight": None}), "missing", r"model\.norm")


def test_a_linear_weight_of_another_shape(single: Path) -> None:
    wrong = {"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 31)}
    refused(changed(single, **wrong), "mismatched", r"layers\.1\.mlp\.up_proj", r"48, 31", r"48, 32")


def test_tensors_that_the_model_does_not_have(single: Path) -> None:
    extra = {
        "model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32),
        "model.layers.0.mlp.up_proj.bias": torch.ones(48),
    }
    refused(changed(single, **extra), "unexpected", r"layers\.2\.mlp\.up_proj", r"layers\.0\.mlp\.up_proj\.bias")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({}, "an unnamed format"),
    ],
)
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_a_format_that_is_not_read(folder: Path, storage: str, config: dict[str, Any], named: str) -> None:
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**own, "quantization_config": config}))
    refused(folder, f"quantised as {named}", "bitsandbytes 4-bit nf4", "original", storage=storage)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory(llama: Path, error: Exception) -> None:
    with mock.patch.object(storage_class("nf4"), "from_weight", side_effect=error):
        refused(llama, "does not fit", "nf4 float32", "--bnb-4bit-use-double-quant", "smaller base", dtype="float32")


def test_fp8_where_nothing_multiplies_it(llama: Path) -> None:
    refused(llama, "fp8 needs a GPU", "the CPU", "--load-in-8bit", storage="fp8", device="cpu")


# Saving.


@pytest.mark.parametrize("storage", [s for s in ON_CPU if not s.startswith("nf4")])
def test_a_storage_without_a_file_format_is_not_saved(llama: Path, tmp_path: Path, storage: str) -> None:
    with pytest.raises(ModelError, match=f"stored as {storage}.*--into-base"):
        load(str(llama), storage=storage).model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_real_model_in_four_bits(smollm2: Any) -> None:
    """SmolLM2-135M, doubly quantised: a seventh of the bytes in its linear layers, and it still knows Paris."""
    loaded = load("smollm2", "float32", storage="nf4-dq")
    model, tokenizer = loaded
    assert loaded.fingerprint == smollm2.fingerprint
    leaves = leaves_of(model)
    elements = sum(leaf.in_features * leaf.out_features for leaf in leaves.values())
    stored = sum(p.nbytes for leaf in leaves.values() for p in leaf.parameters())
    assert len(leaves) == 210 and 8 * stored / elements < 4.16  # 4.127, and 1 KiB a layer for the nested map
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    said = tokenizer.decode(model.generate(text, max_new_tokens=12, do_sample=False)[0, text.shape[1] :])
    assert "Paris" in said
