"""GGUF files as they lie on disk: what gguf reads of them, what transformers reads, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.merge.gguf.conftest import MODELS, save_adapter, tokenizer_cutting
from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.cli.__main__ import main
from veneer.errors import ModelError, NotMergeable, WrongBaseError
from veneer.merge.gguf.adapter_file import write_adapter
from veneer.merge.gguf.family import family_of
from veneer.merge.gguf.splitting import splitting_of
from veneer.merge.gguf.tensors import interleaved
from veneer.merge.into_base import merge_into_base
from veneer.model.load import load

Folders = Callable[..., Path]
HALVES = {"torch.float16": 2**-11, "torch.bfloat16": 2**-8}


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    read = GGUFReader(file).tensors
    return {t.name: torch.tensor(np.array(dequantize(t.data, t.tensor_type))) for t in read}


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_rows_that_are_rotated_together_come_to_stand_side_by_side(heads: int, half: int, width: int) -> None:
    rows = torch.arange(heads * 2 * half * width).view(heads * 2 * half, width)
    found = interleaved(rows, heads)
    for head in range(heads):
        for pair in range(half):
            first, second = head * 2 * half + pair, head * 2 * half + half + pair
            at = head * 2 * half + 2 * pair
            assert torch.equal(found[at], rows[first]) and torch.equal(found[at + 1], rows[second])


@pytest.mark.parametrize("name", MODELS)
def test_the_factors_of_a_file_are_those_of_the_adapter(model_folder: Folders, tmp_path: Path, name: str) -> None:
    """alpha / R · B A of every layer, with the R of each, is the update in llama.cpp's order of rows."""
    base = model_folder(name)
    adapter = Adapter.load(save_adapter(base, tmp_path / "adapter", rank_pattern={"q_proj": 3, "up_proj": 9}))
    config = AutoConfig.from_pretrained(base)
    write_adapter(tmp_path, adapter, config)
    file, found = GGUFReader(tmp_path / "adapter.gguf"), tensors_of(tmp_path / "adapter.gguf")
    told = {key: file.fields[key].contents() for key in file.fields if not key.startswith("GGUF.")}
    assert told.pop("adapter.lora.alpha") == 9
    assert told == {"general.architecture": name[:5], "general.type": "adapter", "adapter.type": "lora"}
    assert len(found) == 2 * len(adapter.modules())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    parts = dict(zip("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(), KINDS, strict=True))
    for module in adapter.modules():
        a, b = adapter.factors(module)
        kind = parts[module.rpartition(".")[2]]
        stored = f"blk.{module.split('.')[2]}.{kind}.weight"
        update = b @ a
        if kind in heads and name.startswith("llama"):
            update = interleaved(update, heads[kind])
        got = 9 / len(a) * found[f"{stored}.lora_b"] @ found[f"{stored}.lora_a"]
        torch.testing.assert_close(got, update, rtol=1e-5, atol=1e-6)


KINDS = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float16"), ("qwen2", "bfloat16"), ("llama", "float32")])
def test_transformers_reads_the_model_and_its_tokenizer(
    model_folder: Folders, tmp_path: Path, name: str, dtype: str
) -> None:
    """From the file alone: sizes, weights and tokens."""
    base = model_folder(name)
    adapter = save_adapter(base, tmp_path / "adapter")
    report = merge_into_base(str(adapter), str(base), str(tmp_path / "out"), dtype, "gguf")
    ids = torch.arange(3, 43)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        wanted = attach(load(str(base), "float32").model, Adapter.load(adapter))(input_ids=ids).logits
        got = model(input_ids=ids).logits
    # 15 matrices one after the other, each rounded: some dozens of roundings of the largest logit; rows out of place
    # give differences as large as that logit
    bits = HALVES.get(f"torch.{dtype}", 1e-6)
    assert (got - wanted).abs().max() < 40 * bits * wanted.abs().max()
    assert report.logits_difference < 40 * bits * report.logits_scale and report.same_choice > 0.9
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    before = AutoTokenizer.from_pretrained(base)
    assert read("Write 42")["input_ids"] == before("Write 42")["input_ids"]
    assert read.chat_template == before.chat_template
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    short = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype]
    assert {kinds[name] for name in kinds if not name.endswith(("norm.weight", "bias"))} == {short}
    assert {kinds[name] for name in kinds if name.endswith(("norm.weight", "bias"))} == {"F32"}


def test_rows_without_a_token_get_a_name(model_folder: Folders, tmp_path: Path) -> None:
    base = model_folder("qwen3")
    merge_into_base(str(save_adapter(base, tmp_path / "adapter")), str(base), str(tmp_path / "out"), "auto", "gguf")
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    count = len(AutoTokenizer.from_pretrained(base))
    assert tokens[count:] == [f"[PAD{count + i}]" for i in range(5)] and types[count:] == [5] * 5
    assert types[:4] == [3, 3, 3, 1] and tokens[1] == "<|im_start|>"


def test_what_llama_cpp_has_no_adapter_for_is_refused_with_the_way_out(
    model_folder: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_folder("llama")
    dora = save_adapter(base, tmp_path / "dora", method="dora")
    assert main(["convert", str(dora), str(tmp_path / "out"), "--to", "gguf"]) == 2
    told = capsys.readouterr().err
    assert "the method dora" in told and "--into-base --format gguf" in told and not (tmp_path / "out").exists()
    assert main(["merge", str(dora), "--into-base", "--format", "gguf", "-o", str(tmp_path / "out")]) == 0
    config = AutoConfig.from_pretrained(base)
    with pytest.warns(UserWarning, match="tied"):
        rows = save_adapter(base, tmp_path / "rows", target_modules="lm_head", trainable_token_indices=[1, 2])
    with pytest.raises(NotMergeable, match=r"(?s)rows of tokens.*model.embed_tokens.*one weight: lm_head"):
        write_adapter(tmp_path, Adapter.load(rows), config)
    assert not (tmp_path / "adapter.gguf").exists()


def test_an_adapter_of_another_base_is_refused(model_folder: Folders, tmp_path: Path) -> None:
    adapter = save_adapter(model_folder("llama"), tmp_path / "adapter")
    words = ["convert", adapter, tmp_path / "out", "--to", "gguf", "--base-model", model_folder("llama3")]
    assert main([str(word) for word in words]) == 2
    from veneer.config import ConvertSettings
    from veneer.merge.gguf.export import export_adapter

    settings = ConvertSettings(adapter=str(adapter), output=str(tmp_path / "out"), to="gguf")
    with pytest.raises(WrongBaseError, match="weights"):
        export_adapter(settings, str(model_folder("llama3")))
    assert not (tmp_path / "out").exists()


def _config(family: str = "llama", **more: Any) -> Any:
    return AutoConfig.for_model(family, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, **more)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (lambda: AutoConfig.for_model("gpt2"), "the family gpt2: known are llama, qwen2, qwen3"),
        (lambda: _config(hidden_act="gelu"), "hidden_act: got gelu"),
        (lambda: _config("qwen2", use_sliding_window=True, max_window_layers=0, sliding_window=8), "sliding"),
        (lambda: _config("qwen3", attention_bias=True), "attention_bias: llama.cpp's qwen3 has none"),
        (
            lambda: _config("qwen2", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
            "rope_type: got yarn, wanted default",
        ),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(config: Callable[[], Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        family_of(config())


def test_a_way_of_cutting_without_a_name_is_refused() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    def parts(change: Callable[[Tokenizer], None]) -> dict[str, Any]:
        import json

        backend = Tokenizer.from_str(tokenizer_cutting("gpt-2").backend_tokenizer.to_str())
        change(backend)
        return dict(json.loads(backend.to_str()))

    assert splitting_of(parts(lambda backend: None)) == "gpt-2"
    assert splitting_of(parts(lambda b: setattr(b, "normalizer", normalizers.NFC()))) == "gpt-2"
    for change, told in [
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace()), "Whitespace"),
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (lambda b: setattr(b, "normalizer", normalizers.Lowercase()), "normalizer: Lowercase"),
        (
            lambda b: setattr(b, "model", models.BPE({"a": 0}, [], ignore_merges=True)),
            "ignore_merges: True beside gpt-2",
        ),
        (lambda b: setattr(b, "model", models.Unigram([("a", 0.0)])), "model: Unigram"),
    ]:
        with pytest.raises(ModelError, match=f"(?s){told}.*convert_hf_to_gguf.py"):
            splitting_of(parts(change))


def test_an_adapter_of_an_unknown_base_says_so(model_folder: Folders, tmp_path: Path) -> None:
    base = model_folder("llama")
    adapter = Adapter.load(save_adapter(base, tmp_path / "known"))
    Adapter(adapter.tensors, dataclasses.replace(adapter.card, base=None)).save(tmp_path / "adapter")
    from veneer.config import ConvertSettings
    from veneer.merge.gguf.export import export_adapter

    settings = ConvertSettings(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "out"), to="gguf", rank=2)
    report = export_adapter(settings, str(base))
    assert any("base unverified" in note for note in report.notes) and report.kept < 1
    assert {len(t) for name, t in tensors_of(tmp_path / "out" / "adapter.gguf").items() if name.endswith("_a")} == {2}
