"""Adapters of embedding, head and rows of tokens: PEFT as oracle both ways, merging, and what is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families import config_of, gpt2, model_of
from veneer.adapter.attach import attach, detach, merge_into, methods_of
from veneer.adapter.card import CARD, Adapter
from veneer.adapter.formats import CONFIG
from veneer.adapter.peft_tensors import WEIGHTS
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.errors import AdapterError, ConfigError, ModelError, NotMergeable, WrongBaseError
from veneer.model.packed import speaking
from veneer.model.vocabulary import is_tied

FAMILIES: dict[str, Any] = {
    "llama": config_of("llama"),
    "tied": config_of("llama", tie_word_embeddings=True),
    "gemma": config_of("gemma", head_dim=8),  # its embedding is scaled by √D
    "gpt2": gpt2(),
}
BOTH = {"embed_tokens": [3, 60], "lm_head": [3, 60]}
# What PEFT is asked for; `wte` stands for embed_tokens in GPT-2.
CASES: dict[str, dict[str, Any]] = {
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "embedding alone": {"target_modules": ["embed_tokens", "q_proj"], "lora_dropout": 0.1},
    "rslora": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True, "rank_pattern": {"lm_head": 2}},
    "tied factors": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [60, 3]},
    "rows of both": {"target_modules": ["q_proj"], "trainable_token_indices": BOTH},
    "other rows of each": {"target_modules": ["q_proj"], "trainable_token_indices": {**BOTH, "lm_head": [5]}},
    "rows of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5]}},
    "rows, and factors of the head": {"target_modules": ["lm_head"], "trainable_token_indices": [3, 60]},
}
IDS = torch.tensor([[3, 5, 60, 3, 9, 1, 0, 7], [60, 60, 2, 44, 5, 3, 8, 11]])


def base(family: str = "llama") -> Any:
    torch.manual_seed(0)
    return model_of(FAMILIES[family])


def quietly(do: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return do()


def attached(model: Any, source: Any, **more: Any) -> Any:
    return quietly(lambda: attach(model, source, **more))


def randomise(model: Any, slot: str = "default") -> None:
    generator = torch.Generator().manual_seed(1)
    for method in methods_of(model, slot).values():
        for parameter in method.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) / 5


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def equal(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """float32 in another order of sums, over two layers."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.fixture
def theirs(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """theirs(family, config): a PEFT model with random values, and the folder that it has saved."""
    peft = pytest.importorskip("peft")

    def make(family: str, **config: Any) -> tuple[Any, Path]:
        if family == "gpt2":
            config = json.loads(json.dumps(config).replace("embed_tokens", "wte").replace("q_proj", "c_attn"))
        wrapped = peft.get_peft_model(base(family), peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 3, **config}))
        generator = torch.Generator().manual_seed(2)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "tokens_delta" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 5)  # some are views of others
        wrapped.eval().save_pretrained(tmp_path / "theirs")
        return wrapped, tmp_path / "theirs"

    return lambda family, **config: quietly(lambda: make(family, **config))


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in FAMILIES for case in CASES if (family, case) != ("llama", "tied factors")],
)
def test_folders_of_peft_load_and_leave_with_equal_logits(theirs, tmp_path, family, case):
    peft = pytest.importorskip("peft")
    wrapped, folder = theirs(family, **CASES[case])
    wanted, bare = logits(wrapped), logits(base(family))
    model = attached(base(family), Adapter.load(folder))
    equal(logits(model), wanted)
    assert (wanted - bare).abs().max() > 1e-2
    adapter = quietly(lambda: take(model))
    adapter.save(tmp_path / "ours")
    again = Adapter.load(tmp_path / "ours")
    assert again.identity == adapter.identity and again.card == adapter.card
    equal(logits(quietly(lambda: peft.PeftModel.from_pretrained(base(family), tmp_path / "ours")).eval()), wanted)
    with speaking(model, None):
        assert torch.equal(logits(model), bare)


def test_a_copy_of_the_base_in_the_folder_has_to_be_this_base(theirs):
    """PEFT puts it there where an embedding is a target, and loads it over the model's: other weights, silently."""
    _, folder = theirs("llama", **CASES["embedding and head"])
    assert any("base_layer.weight" in key for key in load_file(folder / WEIGHTS))
    adapter = Adapter.load(folder)
    attached(base().to(torch.bfloat16), adapter)  # the copy is in float32: the same, rounded
    other = base()
    other.model.embed_tokens.weight.data[17, 3] += 0.1
    with pytest.raises(WrongBaseError, match=r"not this base's \(resized, or trained on\?\): model\.embed_tokens"):
        attached(other, adapter)


def test_what_an_embedding_is_is_no_part_of_the_identity_but_whose_rows_are(theirs):
    _, folder = theirs("llama", **CASES["rows"])
    before = Adapter.load(folder)
    assert before.card.settings["trainable_token_indices"] == {"model.embed_tokens": [60, 3]}
    assert list(before.rows()) == ["model.embed_tokens"] and before.of("model.embed_tokens")["rows"].shape == (2, 32)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "trainable_token_indices": [60, 4]}))
    assert Adapter.load(folder).identity != before.identity


def test_ids_that_somebody_changed_beside_the_card_are_noticed(tmp_path):
    model = attached(base(), LoraSettings(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 60]))
    folder = take(model).save(tmp_path / "a")
    config = json.loads((folder / CONFIG).read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [3, 60]}
    (folder / CONFIG).write_text(json.dumps({**config, "trainable_token_indices": {"embed_tokens": [3, 61]}}))
    with pytest.raises(AdapterError, match=f"{CARD}: written for identity"):
        Adapter.load(folder)


DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c, t: c.update(trainable_token_indices={str(i): [i] for i in range(9)}),
            ["got 9 modules and rows of 1, wanted at most 8"],
        ),
        (lambda c, t: c.update(trainable_token_indices=None), ["got None, wanted different token ids"]),
        (lambda c, t: c.update(trainable_token_indices=[3, 3]), ["got [3, 3], wanted different token ids"]),
        (lambda c, t: c.update(trainable_token_indices=[3, -1]), ["wanted different token ids"]),
        (lambda c, t: c.update(trainable_token_indices=[3, True]), ["wanted different token ids"]),
        (lambda c, t: c.update(trainable_token_indices="3,5"), ["wanted different token ids"]),
        (lambda c, t: c.update(trainable_token_indices=[3, 5, 7]), ["as many ids as rows", "(3 ids, 2 rows)"]),
        (lambda c, t: c.update(trainable_token_indices={"lm_head": [3, 5]}), ["does not name: model.embed_tokens"]),
        (lambda c, t: c.update(trainable_token_indices={**BOTH, "lm_head": [1]}), ["modules without rows", "lm_head"]),
        (lambda c, t: t.pop(DELTA), ["trainable_token_indices names modules without rows"]),
        (lambda c, t: t[DELTA].__setitem__((0, 0), torch.nan), ["NaN or infinite", DELTA]),
        (lambda c, t: t.update({DELTA: torch.ones(2)}), ["no matrix"]),
        (lambda c, t: t.update({DELTA + ".x": t.pop(DELTA)}), ["not understood", "(trainable tokens)"]),
    ],
)
def test_broken_rows_are_refused(theirs, change, words):
    _, folder = theirs("llama", **CASES["rows"])
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_dora_on_an_embedding_is_not_read(theirs):
    _, folder = theirs("llama", target_modules=["embed_tokens", "q_proj"], use_dora=True)
    with pytest.raises(AdapterError, match=r"model\.embed_tokens: an embedding with more than plain LoRA \(dora\)"):
        Adapter.load(folder)


def test_rows_and_embeddings_on_a_base_that_has_no_place_for_them():
    given = {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}
    factors = quietly(lambda: take(attached(base(), LoraSettings(**given))))
    given = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [60]}
    rows = quietly(lambda: take(attached(base(), LoraSettings(**given))))
    torch.manual_seed(0)
    smaller = model_of(config_of("llama", vocab_size=60, pad_token_id=None))
    factors, rows = (Adapter(a.tensors, dataclasses.replace(a.card, base=None)) for a in (factors, rows))
    with pytest.raises(
        WrongBaseError, match=r"of another shape.*model\.embed_tokens \(adapter \[32, 61\], model \[32, 60\]\)"
    ):
        attached(smaller, factors)
    with pytest.raises(WrongBaseError, match=r"model\.embed_tokens: ids outside its 60 rows, 0 to 59: 60"):
        attached(smaller, rows)
    with pytest.raises(WrongBaseError, match="neither token embedding nor vocabulary head here"):
        attached(base("gpt2"), rows)


# Settings.


@pytest.mark.parametrize(
    ("family", "given", "words"),
    [
        ("llama", {"trainable_token_indices": [61, 3, 99]}, ["ids outside its 61 rows, 0 to 60: 61, 99"]),
        ("llama", {"trainable_token_indices": [3, 3, 5]}, ["ids given twice: 3"]),
        ("llama", {"trainable_token_indices": {"q_proj": [3], "lm_head": []}}, ["'q_proj'", "lm_head: no ids"]),
        (
            "llama",
            {"trainable_token_indices": [3], "target_modules": ["embed_tokens", "q_proj"]},
            ["both rows and factors (leave it out of --target-modules): model.embed_tokens"],
        ),
        ("tied", {"trainable_token_indices": {**BOTH, "lm_head": [3]}}, ["share one weight (tied), and get different"]),
        (
            "tied",
            {"trainable_token_indices": [3], "target_modules": ["lm_head"], "method": "dora"},
            ["goes with --method lora only"],
        ),
        (
            "llama",
            {"target_modules": ["embed_tokens", "q_proj"], "method": "dora"},
            ["--method dora: model.embed_tokens is an embedding", "next: leave it out"],
        ),
        ("gpt2", {"target_modules": ["wpe"]}, ["transformer.wpe is an embedding of something else than tokens"]),
    ],
)
def test_settings_that_cannot_be(family, given, words):
    model = base(family)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError) as caught:
        attached(model, LoraSettings(**{"target_modules": ["c_attn" if family == "gpt2" else "q_proj"], **given}))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    ("family", "given", "words"),
    [
        (
            "tied",
            {"target_modules": ["embed_tokens", "q_proj"]},
            r"share one weight \(tied\).*model.embed_tokens alone",
        ),
        ("llama", {"trainable_token_indices": [3]}, r"rows of model.embed_tokens alone.*tables of their own.*lm_head"),
        ("tied", {"trainable_token_indices": {"lm_head": [3]}}, r"rows of lm_head alone.*cannot be merged"),
    ],
)
def test_what_acts_on_one_of_two_is_said_aloud(family, given, words):
    with pytest.warns(UserWarning, match=words):
        attach(base(family), LoraSettings(**{"target_modules": ["q_proj"], **given}))


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("tied", {"trainable_token_indices": [3]}),
        ("tied", {"trainable_token_indices": BOTH}),
        ("llama", {"trainable_token_indices": BOTH}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ],
)
def test_a_new_adapter_is_the_base_to_the_bit_and_nothing_is_said(family, given):
    model = base(family)
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, LoraSettings(**{"target_modules": ["q_proj"], **given}))
    assert torch.equal(logits(model), before)


# Merging.


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": BOTH}),
        ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60]}),
        ("gemma", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60]}),
        ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [3, 60]}),
    ],
)
def test_merged_into_the_base_tied_or_not(tmp_path, family, given):
    model = base(family)
    tied, kinds = is_tied(model), [type(module) for module in model.modules()]
    attached(model, LoraSettings(r=2, **given))
    randomise(model)
    wanted = logits(model)
    detach(merge_into(model))
    assert [type(module) for module in model.modules()] == kinds and is_tied(model) == tied
    equal(logits(model), wanted)
    model.save_pretrained(tmp_path)
    equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()), wanted)


def test_factors_that_peft_has_tied_merge_into_the_one_weight(theirs):
    wrapped, folder = theirs("tied", **CASES["tied factors"])
    model = attached(base("tied"), Adapter.load(folder))
    merge_into(model)
    assert is_tied(model)
    equal(logits(model), logits(wrapped))


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3]}},
        {"target_modules": ["lm_head"], "trainable_token_indices": [3]},
    ],
)
def test_what_would_make_two_weights_of_one_is_not_merged(given):
    model = base("tied")
    attached(model, LoraSettings(r=2, **given))
    randomise(model)
    before = logits(model)
    with pytest.raises(NotMergeable, match=r"model\.embed_tokens and lm_head share one weight \(tied\).*Next: keep"):
        merge_into(model)
    assert torch.equal(logits(model), before) and is_tied(model)
    detach(model)
    assert torch.equal(logits(model), logits(base("tied")))


def test_an_attached_model_can_be_copied_and_trained_on(theirs):
    """A copy is one of its own, the tied head of the copy among it; what was saved goes on from where it was."""
    _, folder = theirs("tied", **CASES["rows"])
    model = attached(base("tied"), Adapter.load(folder))
    twin = copy.deepcopy(model)
    for method in methods_of(model, "default").values():
        for parameter in method.parameters():
            parameter.data.zero_()
    equal(logits(twin), logits(attached(base("tied"), Adapter.load(folder))))
    assert not torch.equal(logits(model), logits(twin))
    wanted, names = logits(twin), [name for name, _ in twin.named_parameters()]
    twin.tie_weights()  # as transformers does on some ways to load
    assert torch.equal(logits(twin), wanted) and [name for name, _ in twin.named_parameters()] == names
    (rows,) = [m for m in methods_of(twin, "default").values() if m.name == "rows"]
    with pytest.raises(ValueError, match=r"got rows \(1, 32\), wanted \(2, 32\)"):
        rows.restore({"rows": torch.ones(1, 32)})
    rows.restore({"rows": torch.ones(2, 32)})
    assert torch.equal(rows.tensors()["rows"], torch.ones(2, 32))
    assert re.search("rows", str(list(take(twin).tensors)))


def test_a_quantised_embedding_is_refused_by_name():
    model = base()
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(61, 32, dtype=torch.int8), requires_grad=False)
    for given in ({"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [3], "target_modules": ["q_proj"]}):
        with pytest.raises(ModelError, match=r"quantised.*leave it out of --target-modules and --trainable-token"):
            attached(model, LoraSettings(**given))
