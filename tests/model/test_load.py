"""Loading from real checkpoints made here: what comes out, and one clear ModelError for all that is wrong."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from veneer.errors import ModelError
from veneer.model import load as loading
from veneer.model.fingerprint import UNKNOWN, Fingerprint, weights_of
from veneer.model.load import DTYPES, fastest_dtype, load, load_config, load_tokenizer
from veneer.model.norm import FrozenRMSNorm

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(94)} | {"<unk>": 94, "</s>": 95}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model folder in float32 with a tokenizer, written by transformers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def refused(name, *parts: str, **options) -> str:
    """Loading fails with one ModelError that says these things; returns its text."""
    with pytest.raises(ModelError) as caught:
        load(str(name), **options)
    text = str(caught.value)
    for part in parts:
        assert re.search(part, text, re.DOTALL | re.IGNORECASE), f"{part!r} is not in: {text}"
    assert "Traceback" not in text and len(text) < 1500
    return text


# What comes out.


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_gives_the_model_that_transformers_gives(made, dtype):
    loaded = load(str(made), dtype=dtype)
    model, tokenizer = loaded
    assert model is loaded.model and tokenizer is loaded.tokenizer
    own = AutoModelForCausalLM.from_pretrained(made, dtype=DTYPES[dtype]).eval()
    assert model.dtype == DTYPES[dtype] and loaded.storage == f"dense {dtype}" and loaded.name == str(made)
    mine, theirs = model.state_dict(), own.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        got, wanted = model(ids).logits.float(), own(ids).logits.float()
    # The fused norm is off by an ulp of the dtype, in 5 places one after the other.
    assert (got - wanted).abs().max() < {"float32": 1e-5, "bfloat16": 0.03, "float16": 4e-3}[dtype] * wanted.abs().max()


def test_it_is_frozen_quiet_and_ready(made, capfd):
    model, tokenizer = load(str(made))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert sum(isinstance(m, FrozenRMSNorm) for m in model.modules()) == 5
    assert tokenizer.pad_token == tokenizer.eos_token  # it had none
    assert model.config._attn_implementation == "sdpa"


def test_auto_is_the_fastest_dtype(made):
    assert load(str(made)).model.dtype == fastest_dtype(torch.device("cpu"))
    assert fastest_dtype(torch.device("cuda")) == torch.bfloat16
    with (
        mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", return_value=False),
        mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False),
    ):
        assert fastest_dtype(torch.device("cpu")) == torch.float32


def test_the_fingerprint_is_that_of_the_files_in_any_dtype(made):
    prints = [load(str(made), dtype=dtype).fingerprint for dtype in DTYPES]
    assert prints[0] == prints[1] and prints[0].weights == weights_of([made / "model.safetensors"])
    assert UNKNOWN not in prints[0].to_json().values()
    assert load(str(made)).model.veneer_fingerprint == prints[0] != Fingerprint()


def test_a_given_tokenizer_is_used(made):
    tokenizer = words()
    assert load(str(made), tokenizer=tokenizer).tokenizer is tokenizer


def test_tokenizer_and_config_alone(made):
    assert load_tokenizer(str(made)).get_vocab() == words().get_vocab()
    assert load_config(str(made)).num_hidden_layers == 2


def test_a_sharded_folder_is_the_same_model(made, tmp_path):
    own = AutoModelForCausalLM.from_pretrained(made)
    own.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    words().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert load(str(tmp_path / "shards")).fingerprint == load(str(made)).fingerprint


@pytest.mark.slow
def test_the_packaged_gguf_loads(smollm2):
    """SmolLM2-135M: 134.5 million parameters with a tied head, a chat template, float32 as asked."""
    model, tokenizer = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "<|im_start|>" in tokenizer.chat_template
    assert UNKNOWN not in smollm2.fingerprint.to_json().values()
    assert model.veneer_stored_dtype == torch.float32  # 4-bit values are no bfloat16 numbers
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    said = tokenizer.decode(model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :])
    assert "Paris" in said


# What is refused.


def test_an_unknown_hub_id_offline(tmp_path, monkeypatch):
    """At once, not after a minute of attempts; the nearest known name is offered."""
    started = time.monotonic()
    refused("smollm", "'smollm'", "Did you mean 'smollm2'", "folder")
    refused("nobody/nothing", "'nobody/nothing'", "hub id")
    refused("not a name!", "'not a name!'")
    assert time.monotonic() - started < 20


def test_an_unknown_name_in_every_way_of_asking():
    for ask in (load, load_tokenizer, load_config):
        with pytest.raises(ModelError, match="nobody/nothing"):
            ask("nobody/nothing")


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16", ""])
def test_an_unknown_dtype(made, dtype):
    refused(made, "dtype", "auto, float32, bfloat16, float16", dtype=dtype)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(made, device):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    refused(made, f"device '{device}'", "cpu", device=device)


@pytest.mark.parametrize("device", ["gpu", "tpu", "", "mps:x"])
def test_an_unknown_device(made, device):
    refused(made, "device", device=device)


def test_an_adapter_folder(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    refused(folder, "adapter folder")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors")


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "tokenizer")


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json|JSON")


def test_a_config_of_an_unknown_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsuch", "architectures": ["Nonsuch"]}))
    refused(folder, "nonsuch")


def test_code_in_the_folder_is_never_run_and_nobody_is_asked(folder, capfd):
    """transformers would ask on the terminal for 15 seconds whether to run it."""
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsuch", "auto_map": code}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    started = time.monotonic()
    with mock.patch("builtins.input", side_effect=AssertionError("asked on the terminal")) as asked:
        refused(folder)
    assert time.monotonic() - started < 10 and not asked.called
    assert not (folder / "ran").exists()
    assert capfd.readouterr().out == ""


def test_truncated_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(folder, "safetensors|header|incomplete|invalid|truncated")


def test_a_tensor_that_is_missing_is_not_made_up(folder):
    """transformers fills it with random numbers and a warning, which would train an adapter for nobody's model."""
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"layers\.1\.mlp\.up_proj")


def test_a_tensor_of_another_shape(folder):
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"size|shape|mismatch")


def test_tensors_that_the_model_does_not_have(folder):
    """A third layer in the file and two in the config: the config is not this file's."""
    state = load_file(folder / "model.safetensors")
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"layers\.2\.mlp\.up_proj")


def test_a_pickle_instead_of_safetensors(folder):
    """Never torch.load: a pickle can run code."""
    (folder / "model.safetensors").unlink()
    torch.save(LlamaForCausalLM(LlamaConfig(**SIZES)).state_dict(), folder / "pytorch_model.bin")
    refused(folder, "safetensors")


def test_nan_in_the_weights(folder):
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "nan")


def test_a_quantised_checkpoint(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    refused(folder)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", pickle.dumps({})])
def test_a_gguf_file_that_is_none(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    refused(tmp_path / "a.gguf", "a.gguf")


def test_a_family_that_the_packed_forward_cannot_compute(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}
    BloomForCausalLM(BloomConfig(**sizes, initializer_range=0.3)).save_pretrained(tmp_path / "m")
    words().save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", "bloom", "of three packed sequences")
    model = load(str(tmp_path / "m"), check=False).model  # for those who only want ordinary calls
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 96)


def test_an_error_of_ours_is_not_taken_for_theirs(made):
    """A bug in veneer must not be reported as an unknown model."""
    with mock.patch.object(loading, "swap_norms", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        load(str(made))


def config_with(**changes):
    def edit(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(whole | changes))

    return edit


def written(name: str, raw: bytes):
    return lambda folder: (folder / name).write_bytes(raw)


INDEX = "model.safetensors.index.json"
HOSTILE = {
    "config 100,000 deep": written("config.json", b"[" * 100_000),
    "config that is a list": written("config.json", b"[]"),
    "config in bad UTF-8": written("config.json", b'{"model_type": "\xff"}'),
    "width -1": config_with(hidden_size=-1),
    "width as text": config_with(hidden_size="32"),
    "width of 2^62": config_with(hidden_size=2**62),
    "no heads": config_with(num_attention_heads=0),
    "family that is no text": config_with(model_type=["llama"]),
    "weights of 0 bytes": written("model.safetensors", b""),
    "weights with a header of 2^62": written("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    "weights that are a pickle": written("model.safetensors", pickle.dumps({})),
    "tokenizer 100,000 deep": written("tokenizer.json", b"[" * 100_000),
    "shards that lead out of the folder": lambda folder: (
        (folder / "model.safetensors").rename(folder.parent / "out.safetensors"),
        (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../out.safetensors"}})),
    ),
    "shards 100,000 deep": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / INDEX).write_bytes(b"[" * 100_000),
    ),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_folder_is_refused(folder, fault):
    HOSTILE[fault](folder)
    started = time.monotonic()
    refused(folder)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "raw", [b"", b"GGUF", b"GGUF" + b"\xff" * 200, b"GGUF\x03\0\0\0" + b"\0" * 16, b"\x80\x04" * 40]
)
def test_hostile_gguf_is_refused(tmp_path, raw):
    (tmp_path / "model.gguf").write_bytes(raw)
    refused(tmp_path / "model.gguf")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_hostile_code_beside_a_known_family_is_never_run(folder, file):
    told = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    whole = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(whole | {"auto_map": told}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with mock.patch("builtins.input", side_effect=AssertionError("asked on the terminal")):
        load(str(folder), check=False)
    assert not (folder / "ran").exists()
