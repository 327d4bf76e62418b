"""The adapter nearest to what a tuned model changed: the way back from a merge, and what it cannot hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from veneer.adapter.attach import attach, merge_into
from veneer.adapter.card import Adapter
from veneer.cli.__main__ import main
from veneer.errors import ModelError
from veneer.merge import checkpoints
from veneer.merge.changes import distance
from veneer.merge.extract import extracted
from veneer.merge.into_base import merge_into_base
from veneer.model.load import load
from veneer.model.source import Source

IDS = torch.arange(3, 43).reshape(2, 20)
LINEAR = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
Tune = Callable[..., Path]


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.fixture
def tune(base: Path, tmp_path: Path) -> Tune:
    """tune(change, dtype, of=base, **saving): a copy of the model with `change` made to each parameter, in a folder."""

    def make(
        change: Callable[[str, torch.Tensor], Any], dtype: str = "float32", of: Path | None = None, **saving: Any
    ) -> Path:
        folder = tmp_path / "tuned"
        model = AutoModelForCausalLM.from_pretrained(of or base, dtype=torch.float32)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(5)
            for name, parameter in model.named_parameters():
                change(name, parameter)
        model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
        AutoTokenizer.from_pretrained(of or base).save_pretrained(folder)
        return folder

    return make


def everything_linear(name: str, parameter: torch.Tensor) -> None:
    if "_proj" in name:
        parameter += 0.01 * torch.randn_like(parameter)


def nothing(name: str, parameter: torch.Tensor) -> None:
    pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_merged_comes_back_to_the_rounding_of_the_dtype(
    base: Path, adapter_folder: Path, tmp_path: Path, dtype: str
) -> None:
    merge_into_base(str(adapter_folder), str(base), str(tmp_path / "tuned"), dtype)
    given, before, after = Adapter.load(adapter_folder), weights(base), weights(tmp_path / "tuned")
    found, report = extracted(str(base), str(tmp_path / "tuned"), rank=4)
    assert sorted(found.modules()) == sorted(given.modules()) and set(found.card.ranks.values()) == {4}
    for module in given.modules():
        a, b = given.factors(module)
        c, d = found.factors(module)
        difference = after[f"{module}.weight"] - before[f"{module}.weight"]
        rounding = float((difference - b @ a).norm())
        # Both are of rank 4, and d c is the nearest of that rank: |d c - b a| <= 2 |difference - b a|.
        assert float((d @ c - b @ a).norm()) <= 2.01 * rounding + 1e-6 * float((b @ a).norm())
        assert float((difference - d @ c).norm()) == pytest.approx(report.layers[module].error, rel=1e-3, abs=1e-6)
    assert report.kept > (0.9999 if dtype == "float32" else 0.97)
    assert len(report.notes) == (dtype != "float32"), report.notes


@torch.no_grad()
def test_it_acts_like_what_was_merged(base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    merge_into_base(str(adapter_folder), str(base), str(tmp_path / "tuned"), "float32")
    found, _ = extracted(str(base), str(tmp_path / "tuned"), rank=4)
    loaded = load(str(base), "float32")
    attach(loaded.model, found, "found")  # the base is that of the card, or this raises
    merge_into(loaded.model, "found")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")(input_ids=IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS).logits
    torch.testing.assert_close(loaded.model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert float((plain - wanted).abs().max()) > 1e-2, "the adapter does next to nothing: this tests nothing"
    assert found.card.base == loaded.fingerprint and found.card.template_text == loaded.tokenizer.chat_template


def test_full_rank_reproduces_the_tuned_weights(base: Path, tune: Tune, tmp_path: Path) -> None:
    tuned = tune(everything_linear)
    found, report = extracted(str(base), str(tuned), rank=10_000)
    found.save(tmp_path / "adapter")
    merge_into_base(str(tmp_path / "adapter"), str(base), str(tmp_path / "again"), "float32")
    wanted = weights(tuned)
    for name, got in weights(tmp_path / "again").items():
        torch.testing.assert_close(got, wanted[name], rtol=0, atol=1e-6)
    assert report.kept == pytest.approx(1) and len(report.layers) == 14 and report.lost == {}


def test_energy_is_kept_in_each_layer_with_the_fewest_directions(base: Path, tune: Tune) -> None:
    tuned = tune(everything_linear)
    found, report = extracted(str(base), str(tuned), energy=0.7)
    before, after = weights(base), weights(tuned)
    for module in found.modules():
        s = torch.linalg.svdvals((after[f"{module}.weight"] - before[f"{module}.weight"]).double()).square()
        count = report.layers[module].rank
        assert s[: count - 1].sum() < 0.7 * s.sum() <= s[:count].sum() * (1 + 1e-6)
        assert report.layers[module].kept == pytest.approx(float(s[:count].sum() / s.sum()), rel=1e-4)


def test_shards_give_the_same_bytes_and_no_model_is_loaded(
    base: Path, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = extracted(str(base), str(tune(everything_linear)), rank=3)[0]
    shutil.rmtree(tmp_path / "tuned")
    sharded = tune(everything_linear, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("a whole model"))
    other = extracted(str(base), str(sharded), rank=3)[0]
    assert other.identity == one.identity


def test_layers_that_did_not_change_have_nothing(base: Path, tune: Tune) -> None:
    def one_layer(name: str, parameter: torch.Tensor) -> None:
        if name == "model.layers.1.mlp.up_proj.weight":
            everything_linear(name, parameter)

    found, _ = extracted(str(base), str(tune(one_layer)), rank=2)
    assert found.modules() == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_model_again_even_rounded_leaves_nothing_to_extract(base: Path, tune: Tune, dtype: str) -> None:
    with pytest.raises(ModelError, match="the same in every linear layer"):
        extracted(str(base), str(tune(nothing, dtype)), rank=2)


@pytest.mark.parametrize(("step", "moved"), [(5e-5, True), (2.0**-26, False)])
def test_below_the_normal_numbers_of_float16_a_change_is_one(step: float, moved: bool) -> None:
    """Half of 2^-24, the distance of subnormal numbers, is what rounding does there; the smallest normal is 6.1e-5."""
    base = torch.tensor([0.0, 2.0**-20, 3e-5], dtype=torch.float32)
    assert (distance(base, (base + step).half()) > 0) == moved


def test_norms_and_embeddings_that_changed_are_measured_and_refused(base: Path, tune: Tune, tmp_path: Path) -> None:
    def more(name: str, parameter: torch.Tensor) -> None:
        everything_linear(name, parameter)
        if "layers.1.input_layernorm" in name or "embed" in name:
            parameter *= 1.25

    tuned = tune(more, "bfloat16")
    with pytest.raises(ModelError) as error:
        extracted(str(base), str(tuned), rank=2)
    text = str(error.value)
    assert "model.layers.*.input_layernorm.weight: 1 of 2 changed, by 0.25 of their norm" in text
    assert "model.embed_tokens.weight: 1 of 1 changed, by 0.25 of their norm" in text
    assert "post_attention" not in text and "--force" in text
    found, report = extracted(str(base), str(tuned), rank=2, force=True)
    assert len(found.modules()) == 14 and report.lost.keys() == {
        "model.layers.*.input_layernorm.weight",
        "model.embed_tokens.weight",
    }
    assert [note.startswith("lost: ") for note in report.notes] == [True, True, False]


@pytest.fixture
def gpt2(base: Path, tmp_path: Path) -> Path:
    """A family with biases, and layers stored as (in, out)."""
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_layers_stored_transposed(gpt2: Path, tune: Tune, tmp_path: Path) -> None:
    def attention(name: str, parameter: torch.Tensor) -> None:
        if "c_attn.weight" in name:
            parameter += 0.01 * torch.randn_like(parameter)

    tuned = tune(attention, of=gpt2)
    found, _ = extracted(str(gpt2), str(tuned), rank=100)
    assert found.modules() == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert found.factors(found.modules()[0])[1].shape == (96, 32)
    found.save(tmp_path / "adapter")
    merge_into_base(str(tmp_path / "adapter"), str(gpt2), str(tmp_path / "again"), "float32")
    wanted = weights(tuned)
    for name, got in weights(tmp_path / "again").items():
        torch.testing.assert_close(got, wanted[name], rtol=0, atol=1e-6)


def test_biases_that_changed_are_refused(gpt2: Path, tune: Tune) -> None:
    def biases(name: str, parameter: torch.Tensor) -> None:
        if name.endswith("c_fc.bias"):
            parameter += 0.5

    with pytest.raises(ModelError, match=r"h\.\*\.mlp\.c_fc\.bias: 2 of 2 changed"):
        extracted(str(gpt2), str(tune(biases, of=gpt2)), rank=2)


def test_another_architecture_is_refused_with_all_that_differs(base: Path, gpt2: Path) -> None:
    with pytest.raises(ModelError) as error:
        extracted(str(base), str(gpt2), rank=2)
    assert "model_type: base llama, tuned gpt2" in str(error.value) and "is of another architecture" in str(error.value)


def test_tensors_that_are_missing_or_of_another_shape_are_named(base: Path, tune: Tune) -> None:
    from safetensors.torch import load_file, save_file

    tuned = tune(everything_linear)
    tensors = load_file(tuned / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        extracted(str(base), str(tuned), rank=2)
    assert "model.layers.0.mlp.up_proj.weight" in str(error.value)
    assert "model.layers.1.mlp.up_proj.weight (base [64, 32], tuned [3, 32])" in str(error.value)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised as GPTQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, r"quantised \(nf4\)"),
    ],
)
def test_quantised_models_are_refused(base: Path, tune: Tune, config: dict[str, Any], told: str) -> None:
    tuned = tune(everything_linear)
    file = tuned / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    for pair in ((str(base), str(tuned)), (str(tuned), str(base))):
        with pytest.raises(ModelError, match=told):
            extracted(*pair, rank=2)


def test_a_gguf_that_is_not_unpacked_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "opened", lambda source: Source(source.name, source.place, "model.gguf"))
    with pytest.raises(ModelError, match="is a quantised model"):
        extracted(str(base), str(base), rank=2)


def test_integers_in_a_checkpoint_are_refused(base: Path, tune: Tune) -> None:
    from safetensors.torch import load_file, save_file

    tuned = tune(everything_linear)
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 32, dtype=torch.int8)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight of .* is stored as int8"):
        extracted(str(base), str(tuned), rank=2)


def test_values_that_are_not_finite_are_refused_with_their_layers(base: Path, tune: Tune) -> None:
    def broken(name: str, parameter: torch.Tensor) -> None:
        if "0.mlp.up_proj" in name:
            parameter[0, 0] = torch.nan

    with pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj: the difference holds NaN"):
        extracted(str(base), str(tune(broken)), rank=2)


def test_another_tokenizer_is_a_loss(base: Path, tune: Tune) -> None:
    tuned = tune(everything_linear)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tuned)
    with pytest.raises(ModelError, match="makes other token ids"):
        extracted(str(base), str(tuned), rank=2)


def test_on_the_command_line(base: Path, tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tune(everything_linear)
    words = ["convert", "--extract", str(tuned), "--base-model", str(base), "--rank", "3", "--json"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert 0 < report["kept"] < 1
    assert {row["layers"].partition("*.")[2] for row in report["kinds"]} == set(LINEAR.split())
    found = Adapter.load(tmp_path / "out")
    assert found.identity == report["identity"] and set(found.card.ranks.values()) == {3}
    assert found.card.base_name == str(base) and found.card.training["extract"]["rank"] == 3
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert main(["convert", "--extract", str(tuned), "--base-model", "org/none", "--rank", "3", "-o", "x"]) == 2
    assert "org/none" in capsys.readouterr().err
