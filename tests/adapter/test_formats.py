"""PEFT folders in and out. The oracle is PEFT itself; the faults are made by hand, one or several at a time."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from veneer.adapter import peft_config
from veneer.adapter.card import Adapter
from veneer.adapter.formats import CONFIG, read_peft, write_peft
from veneer.adapter.patterns import TooCostly, named, resolve
from veneer.adapter.peft_tensors import WEIGHTS
from veneer.errors import AdapterError

peft = pytest.importorskip("peft")
from peft.utils.other import get_pattern_key  # noqa: E402

EPS = torch.finfo(torch.float32).eps
LAYER_0 = "model.layers.0.self_attn.q_proj"

CONFIGS = {
    "lora": {"r": 4, "lora_alpha": 11, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {r"layers\.0\..*q_proj": 2, "up_proj": 6, r"^model.layers.1.self_attn.k_proj": 3},
        "alpha_pattern": {"q_proj": 5, r"layers\.[01]\.mlp\.(up|down)_proj": 7},
    },
    "rslora patterns": {
        "r": 4,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 9},
        "alpha_pattern": {"1.self_attn.q_proj": 2.5},
    },
    "gaussian": {"r": 3, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": ["o_proj"]},
    "regex": {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.1\..*(gate|o)_proj"},
    "dropout": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["lm_head", "q_proj"]},
    "layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
}


def trained(model, **config) -> peft.PeftModel:
    """A PEFT model whose factors are all random."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return wrapped.eval()


def adapted_layers(wrapped: peft.PeftModel) -> dict[str, peft.tuners.lora.LoraLayer]:
    named_modules = wrapped.base_model.model.named_modules()
    return {path: module for path, module in named_modules if isinstance(module, peft.tuners.lora.LoraLayer)}


def densely(model, adapter: Adapter):
    """A copy of the model with W + b a as its weights."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for module in adapter.modules():
            a_RI, b_OR = adapter.factors(module)
            dense.get_submodule(module).weight += b_OR @ a_RI
    return dense


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peft_folder_gives_the_update_that_peft_computes(pico, tmp_path, config, dtype):
    wrapped = trained(pico(), **config)
    if dtype is not torch.float32:
        for layer in adapted_layers(wrapped).values():
            layer.to(dtype)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)  # else lm_head is copied into the adapter
    adapter = Adapter.load(tmp_path)
    layers = adapted_layers(wrapped.float())
    assert adapter.modules() and set(adapter.modules()) == set(layers)
    for module, layer in layers.items():
        a_RI, b_OR = adapter.factors(module)
        # each side rounds once for each of R products, sums and scalings
        bound = 2 * (len(a_RI) + 2) * EPS * (b_OR.abs() @ a_RI.abs())
        assert ((b_OR @ a_RI - layer.get_delta_weight("default")).abs() <= bound).all(), module
        assert adapter.card.scales[module] == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert adapter.card.ranks[module] == layer.r["default"]
    assert adapter.card.base is None


@pytest.mark.parametrize("layers", [2, 12])
def test_peft_loads_what_we_save_and_computes_the_same(pico, adapter_for, tmp_path, layers):
    model = pico(layers=layers)
    ranks = {f"model.layers.{n}.self_attn.q_proj": 1 + n % 5 for n in range(layers)}
    ranks |= {f"model.layers.{n}.mlp.down_proj": 3 + n % 2 for n in range(1, layers)}  # layer 0 is left out
    adapter = adapter_for(model, ranks, base_name="pico")
    adapter.save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing or unexpected key is a warning in PEFT
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT calls transformers by an old name
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    found = adapted_layers(wrapped)
    assert {path: layer.r["default"] for path, layer in found.items()} == ranks
    assert {layer.scaling["default"] for layer in found.values()} == {1.0}
    ids_BT = torch.arange(24).reshape(2, 12)
    wanted_BTV, base_BTV = densely(model, adapter)(ids_BT).logits, model(ids_BT).logits
    assert (wanted_BTV - base_BTV).abs().max() > 1e-3
    torch.testing.assert_close(wrapped(ids_BT).logits, wanted_BTV, rtol=0, atol=1e-5)


def test_folder_to_adapter_to_folder_to_peft(pico, tmp_path):
    model = pico()
    wrapped = trained(copy.deepcopy(model), **CONFIGS["rslora patterns"])
    wrapped.save_pretrained(tmp_path / "theirs")
    Adapter.load(tmp_path / "theirs").save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    ids_BT = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(again(ids_BT).logits, wrapped(ids_BT).logits, rtol=0, atol=1e-5)


PARTS = ["model", "layers", "vision", "0", "1", "11", "a", "b", "a_b", "a-b", "q", "q_proj"]
PATTERNS = ["q", "q_proj", "1.q", r"layers\.1\..*", "^model.*q", "(a_b|q)", "layers.[01].q", "1", ".*"]
BOMBS = ["(a+)+b", "(a|a)*b", "(a|aa)+$", "(.*)*x", "a?" * 40 + "a" * 40, ".*" * 12 + "b", "((a{1,9}){1,9}){1,9}b"]
names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4)


@example({"layers.1.q": 1, "vision.layers.1.q": 2, "layers.11.q": 3, "a.b": 4, "a_b": 5})
@given(st.dictionaries(names.map(".".join), st.integers(1, 5), min_size=1, max_size=12))
def test_peft_resolves_every_rank_that_we_write(ranks):
    config = json.loads(json.dumps(peft_config.written(ranks, None), sort_keys=True))
    for module, rank in ranks.items():
        for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            assert config[key].get(get_pattern_key(config[key].keys(), module), config[default]) == rank
    assert peft_config.scales(config, ranks, []) == dict.fromkeys(ranks, 1.0)


@given(
    st.lists(names.map(".".join), min_size=1, max_size=8, unique=True),
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(), max_size=5),
)
def test_patterns_are_resolved_as_peft_resolves_them(modules, patterns):
    wanted = {module: patterns.get(get_pattern_key(patterns.keys(), module), "usual") for module in modules}
    assert resolve(patterns, modules, "usual") == wanted


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pattern_that_would_hang_python_is_matched_at_once(bomb):
    start = time.process_time()
    assert resolve({bomb: 1}, ["a" * 40], 2) in ({"a" * 40: 1}, {"a" * 40: 2})
    assert named(bomb, ["a" * 40]) in ([], ["a" * 40])
    assert time.process_time() - start < 1


UNREAD = [
    "(",
    "(?i)q",
    "(?i:q)",
    r"(a)\1",
    "(?<=a)b",
    "(?<!a)b",
    "(a)?(?(1)b|c)",
    "a*" * 15_000,
    "(" * 5_000 + ")" * 5_000,
]
TOO_LONG = "(?:(?:(?:(?:a?){200}){200}){200}){200}b"


@pytest.mark.parametrize("pattern", [*UNREAD, TOO_LONG], ids=lambda pattern: pattern[:20])
def test_a_pattern_that_is_not_read_is_refused_at_once(pattern):
    start = time.process_time()
    with pytest.raises(TooCostly, match="could take" if pattern == TOO_LONG else "."):
        resolve({pattern: 1}, ["a" * 200] * 9, 2)
    assert time.process_time() - start < 10


ATOMS = [
    *"ab1._^$",
    r"\.",
    "[ab]",
    "[^a]",
    r"[\w.]",
    r"\d",
    r"\W",
    r"\b",
    r"\B",
    r"\A",
    r"\Z",
    "(?=a)",
    "(?!b)",
    "a|b",
    "",
]
expressions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: (
        st.builds("{}{}".format, inner, inner)
        | st.builds("({}|{})".format, inner, inner)
        | st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}?", "{2,}"]))
    ),
    max_leaves=6,
)


@settings(max_examples=100)
@given(expressions, st.lists(st.text("ab1_.", min_size=1, max_size=7), min_size=1, max_size=6, unique=True))
def test_an_expression_means_what_it_means_to_python(pattern, modules):
    try:
        ending, whole = re.compile(rf"(.*\.)?({pattern})$"), re.compile(pattern)
    except re.error:
        return
    assert resolve({pattern: True}, modules, False) == {module: bool(ending.match(module)) for module in modules}
    assert named(pattern, modules) == [module for module in modules if whole.fullmatch(module)]


def test_many_uneven_ranks_are_written_and_read_quickly():
    ranks = {
        f"model.layers.{n}.{kind}": 1 + (n * 7 + len(kind)) % 64 for n in range(200) for kind in ("q", "kk", "vvv")
    }
    start = time.process_time()
    assert peft_config.scales(peft_config.written(ranks, None), ranks, []) == dict.fromkeys(ranks, 1.0)
    assert time.process_time() - start < 5


def test_equal_factors_are_equal_bytes_in_any_order(pico, adapter_for):
    adapter = adapter_for(pico())
    pairs = [(module, adapter.of(module)) for module in adapter.modules()]
    assert write_peft(dict(pairs), "base") == write_peft(dict(reversed(pairs)), "base")
    header = write_peft(dict(pairs), "base")[WEIGHTS]
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}


# Faults.


@pytest.fixture
def folder(pico, tmp_path) -> Path:
    """A good PEFT folder, for the test to break."""
    trained(pico(), **CONFIGS["lora"]).save_pretrained(tmp_path / "good")
    return tmp_path / "good"


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def message(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


A, B = (f"base_model.model.{LAYER_0}.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t[A].__setitem__((0, 0), float("nan")), ["NaN or infinite", A]),
        (lambda t: t[B].__setitem__((1, 1), float("-inf")), ["NaN or infinite", B]),
        (lambda t: t.pop(B), ["lora_A without lora_B", LAYER_0]),
        (lambda t: t.pop(A), ["lora_B without lora_A", LAYER_0]),
        (lambda t: t.update({B: torch.zeros(32, 3)}), ["do not chain", "A [4, 32], B [32, 3]"]),
        (lambda t: t.update({A: t[A].T.contiguous()}), ["do not chain", "A [32, 4], B [32, 4]"]),
        (
            lambda t: t.update({A: torch.zeros(3, 32), B: torch.zeros(32, 3)}),
            ["the rank is not", "config 4, tensors 3"],
        ),
        (lambda t: t.update({A: torch.zeros(4), B: torch.tensor(1.0)}), ["do not chain"]),
        (lambda t: t.update({A: t[A].to(torch.int32)}), ["types of numbers", "I32", A]),
        (lambda t: t.update({A: torch.zeros(0, 32), B: torch.zeros(32, 0)}), ["empty tensors", "[0, 32]"]),
        (lambda t: t.update({B: t[B].sign() * 3e38}), ["overflow"]),
        (lambda t: t.update({"x.lora_A.weight": torch.ones(4, 4)}), ["not understood", "'x.lora_A.weight'"]),
        (lambda t: t.update({A.replace(".lora_A", ".lora_A.default"): t.pop(A)}), ["not understood", "lora_A.default"]),
        (lambda t: t.update({"base_model.model.a\n2.lora_A.weight": torch.ones(4, 4)}), ["not understood", r"a\n2"]),
        (
            lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}),
            ["factors without lora_magnitude_vector", "use_dora"],
        ),
        (
            lambda t: t.update({"base_model.model.e.lora_embedding_A": torch.ones(4, 9)}),
            ["lora_A without lora_B", ": e"],
        ),
        (
            lambda t: t.update({A.replace("lora_A.weight", "lora_embedding_A"): torch.ones(4, 32)}),
            ["an adapted embedding whose factors stand under two names"],
        ),
        (
            lambda t: t.update({B.replace("weight", "bias"): torch.ones(32)}),
            ["factors without lora_B.bias", "lora_bias"],
        ),
        (lambda t: t.clear(), ["no tensors"]),
    ],
)
def test_broken_tensors_are_refused(folder, edit, words):
    edit_tensors(folder, edit)
    text = message(folder)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, ["'LOHA'", "only LORA"]),
        ({"peft_type": "NEW_ONE"}, ["'NEW_ONE'"]),
        ({"peft_type": None}, ["peft_type: missing"]),
        ({"use_dora": True}, ["use_dora", "magnitude"]),
        ({"lora_bias": True}, ["lora_bias"]),
        ({"bias": "all"}, ["bias: got 'all'"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices names modules without rows"]),
        ({"target_parameters": ["experts.up"]}, ["target_parameters", "'experts.up'"]),
        ({"target_parameters": "experts.up_proj"}, ["target_parameters: got 'experts.up_proj', wanted a list"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights: got 'pissa_niter_4'"]),
        ({"init_lora_weights": "olora"}, ["init_lora_weights"]),
        ({"init_lora_weights": 1}, ["init_lora_weights"]),
        ({"use_something_new": True}, ["'use_something_new'", "not a known setting"]),
        ({"use_rsloraa": True}, ["'use_rsloraa'", "did you mean 'use_rslora'"]),
        ({"r": -1}, ["r: got -1"]),
        ({"r": True}, ["r: got True"]),
        ({"r": 2**31}, ["config 2147483648, tensors 4"]),
        ({"lora_alpha": 0}, ["lora_alpha: got 0"]),
        ({"lora_alpha": 1e308}, ["lora_alpha: got 1e+308"]),
        ({"lora_alpha": "16"}, ["lora_alpha: got '16'"]),
        ({"lora_dropout": 5.0}, ["lora_dropout: got 5.0"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern", "got 0"]),
        ({"rank_pattern": [1]}, ["rank_pattern: got [1]"]),
        ({"rank_pattern": {"q_proj": 2}}, ["config 2, tensors 4", LAYER_0]),
        ({"alpha_pattern": {"(a+": 2}}, ["alpha_pattern", "'(a+'"]),
        ({"base_model_name_or_path": ["x"]}, ["base_model_name_or_path"]),
    ],
)
def test_configs_that_mean_more_than_lora_are_refused_by_name(folder, changes, words):
    edit_config(folder, **changes)
    text = message(folder)
    assert all(word in text for word in words), text


def test_settings_that_are_off_or_only_about_training_are_accepted(folder):
    before = Adapter.load(folder).identity
    edit_config(folder, use_something_new=False, other_new=None, more_new={}, lora_dropout=0.5, task_type=None)
    edit_config(folder, auto_mapping={"base_model_class": "X", "parent_library": "os"})
    assert Adapter.load(folder).identity == before


@pytest.mark.parametrize("text", ["{", "", "[]", "\xff\xfe", '{"r": NaN}', '{"r": 1, "r": 2}', "[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert CONFIG in message(folder)


def test_missing_files_are_named_together(tmp_path):
    text = message(tmp_path)
    assert f"{CONFIG}: missing" in text and f"{WEIGHTS}: missing" in text


def test_not_a_folder(folder, tmp_path):
    assert "no such folder" in message(tmp_path / "nowhere")
    assert "a file" in message(folder / WEIGHTS)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(folder, keep):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:keep])
    assert "broken or truncated" in message(folder)


def test_a_file_with_something_behind_it_or_a_huge_header_is_refused(folder):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw + b"more")
    assert "broken or truncated" in message(folder)
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + raw[8:])
    assert "broken or truncated" in message(folder)


def test_repeated_keys_in_the_header_are_refused(folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    header = "{" + ", ".join([header[1:-1]] * 2) + "}"
    raw = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    safetensors.torch.load(raw)  # the library accepts it
    (folder / WEIGHTS).write_bytes(raw)
    assert "repeated keys: 'x'" in message(folder)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_a_pickle_is_refused_and_never_opened(folder, tmp_path, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    assert "pickle" in message(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused_without_waiting(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    text = message(folder)
    assert f"{WEIGHTS}: not a regular file" in text and f"{CONFIG}: not a regular file" in text


def test_all_faults_come_in_one_message(folder):
    def edit(tensors):
        tensors[A][0, 0] = float("nan")
        tensors.pop(B.replace("layers.0", "layers.1"))
        tensors["stranger"] = torch.ones(1)

    edit_tensors(folder, edit)
    edit_config(folder, use_dora=True, lora_alpha=None, what=1)
    text = message(folder)
    for word in ("NaN", "lora_A without lora_B", "'stranger'", "use_dora", "lora_alpha: got None", "'what'"):
        assert word in text, word


def test_one_fault_in_many_modules_is_one_line(folder):
    edit_tensors(folder, lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()])
    lines = [line for line in message(folder).splitlines() if "NaN" in line]
    assert len(lines) == 1 and "and 4 more" in lines[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_the_bytes_ends_in_anything_but_adapter_error(tmp_path_factory, data):
    good = tmp_path_factory.getbasetemp() / "fuzz"
    if not good.exists():
        good.mkdir()
        factors = {"m": {"a": torch.ones(2, 3), "b": torch.ones(4, 2)}}
        for name, raw in write_peft(factors, None).items():
            (good / name).write_bytes(raw)
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    whole = (good / name).read_bytes()
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        (good / name).write_bytes(raw)
        faults: list[str] = []
        answer = read_peft(good, faults)
        assert (answer is None) == bool(faults)
    finally:
        (good / name).write_bytes(whole)
