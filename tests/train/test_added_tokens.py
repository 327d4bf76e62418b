"""Runs with --add-tokens: what is trained, resumed, evaluated, said, merged, and read by PEFT; and what is refused."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from veneer.adapter.attach import attach, detach, methods_of
from veneer.adapter.card import CARD, Adapter
from veneer.adapter.take import take
from veneer.cli.__main__ import main
from veneer.config import LoraSettings, RunConfig
from veneer.data.chat import Template, conversation
from veneer.errors import AdapterError, CheckpointError, ConfigError, DataError, VeneerError, WrongBaseError
from veneer.evaluate.model_card import model_card
from veneer.merge.into_base import merge_into_base
from veneer.model.added_tokens import MOST, added_by, extended, tokenizer_of
from veneer.model.generate import generate
from veneer.model.load import Loaded, load, load_tokenizer
from veneer.model.losses import sequence_nll
from veneer.model.packed import speaking
from veneer.train.dry_run import dry_run
from veneer.train.run import train

Config = Callable[..., RunConfig]
ADDED = ["<tool>", "</tool>"]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "coming-from.md"
KINDS = [(tied, spare) for tied in (True, False) for spare in (0, 1, 8)]


@pytest.fixture(scope="session")
def bases(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """bases(tied, spare): the pico base, with a head of its own or not, and rows that its tokenizer does not use."""
    made: dict[tuple[bool, int], Path] = {}

    def make(tied: bool, spare: int) -> Path:
        if (tied, spare) not in made:
            made[tied, spare] = folder = tmp_path_factory.mktemp("bases") / f"{tied}-{spare}"
            tokenizer, config = AutoTokenizer.from_pretrained(pico_folder), LlamaConfig.from_pretrained(pico_folder)
            config.tie_word_embeddings, config.vocab_size = tied, len(tokenizer) + spare
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return made[tied, spare]

    return make


@pytest.fixture(scope="session")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose answers stand between the new tokens."""
    file = tmp_path_factory.mktemp("data") / "calls.jsonl"
    rows = [{"prompt": f"Write {n:02d}", "completion": f"<tool>{n % 10}</tool>"} for n in range(10, 90)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def run(config: Config, calls: Path, tmp_path: Path) -> Config:
    """run(base, **options): a run with the new tokens."""

    def make(base: Path, **options: Any) -> RunConfig:
        given = {"base_model": str(base), "dataset": str(calls), "add_tokens": ADDED, "target_modules": "q_proj"}
        return config(**{**given, **options})

    return make


def random_adapter(base: Path, **settings: Any) -> Adapter:
    """With the new tokens and every number random."""
    model = load(str(base), "float32").model
    attach(model, LoraSettings(**{"r": 2, "target_modules": ["q_proj"], "add_tokens": ADDED, **settings}))
    generator = torch.Generator().manual_seed(1)
    for method in methods_of(model, "default").values():
        for parameter in method.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) / 5
    return take(model)


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


def some_ids(first: int) -> list[int]:
    return [5, first, 7, first + 1, 300, first, 2]


@pytest.mark.parametrize(("tied", "spare"), KINDS)
def test_peft_and_transformers_give_the_same_logits_and_so_does_the_merged_model(bases, tmp_path, tied, spare):
    pytest.importorskip("peft")
    base = bases(tied, spare)
    adapter = random_adapter(base)
    folder = adapter.save(tmp_path / "adapter")
    assert Adapter.load(folder).identity == adapter.identity
    loaded = load(str(base), "float32")
    bare = logits(loaded.model, [3, 4, 5])
    attach(loaded.model, Adapter.load(folder))
    first = len(loaded.tokenizer)
    assert added_by(loaded.model, "default") == {"<tool>": first, "</tool>": first + 1}
    wanted = logits(loaded.model, some_ids(first))
    assert wanted.shape[1] == max(first + spare, first + 2) and wanted.isfinite().all()
    with speaking(loaded.model, None):
        assert torch.equal(logits(loaded.model, [3, 4, 5]), bare)  # as wide as it was, and to the bit

    # What docs/coming-from.md and the model card tell users of PEFT.
    [code] = re.findall("```python\n(.*?)```", model_card(adapter.card, None, str(folder)), re.S)
    [documented] = re.findall("```python\n(import json.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    for text in (code, documented.replace("out/calls", str(folder))):
        found: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(text.replace("BASE", str(base)), found)
        theirs, tokenizer = found["model"].eval(), found["tokenizer"]
        assert tokenizer.convert_tokens_to_ids(ADDED) == [first, first + 1]
        torch.testing.assert_close(logits(theirs, some_ids(first)), wanted, rtol=1e-4, atol=1e-5)

    report = merge_into_base(str(folder), str(base), str(tmp_path / "merged"), "float32")
    assert report.logits_difference < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, some_ids(first)), wanted, rtol=1e-4, atol=1e-5)
    assert merged.config.vocab_size == len(merged.model.embed_tokens.weight) == wanted.shape[1]
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    again = load(str(tmp_path / "merged"), "float32")
    assert again.tokenizer.encode("Write<tool>7</tool>") == tokenizer.encode("Write<tool>7</tool>")
    assert again.tokenizer.decode([first, first + 1], skip_special_tokens=True) == "<tool></tool>"


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_learns_to_say_them_and_is_resumed_to_the_same_bytes(run, bases, stopping, tmp_path, capsys, calls, tied):
    base = bases(tied, 0)
    settings = {"target_modules": "all-linear", "learning_rate": 2e-2, "per_device_train_batch_size": 16}
    whole = run(base, max_steps=40, eval_steps=20, **settings)
    result = train(whole, progress=False)
    assert result.eval_loss_before is not None and result.best_eval_loss is not None
    assert result.best_eval_loss < result.eval_loss_before - 2
    broken = run(base, **{**whole.to_flat(), "output_dir": str(tmp_path / "broken")})
    stopping(broken, 8)
    train(broken, resume=True, progress=False)
    raws = [(Path(one.output_dir) / "adapter_model.safetensors").read_bytes() for one in (whole, broken)]
    assert raws[0] == raws[1]
    with pytest.raises(CheckpointError, match=r"add_tokens: it has"):
        train(run(base, **{**broken.to_flat(), "add_tokens": ["<x>"]}), resume=True, progress=False)
    # The fingerprint is the base's own, and every verb knows the tokens from the folder alone.
    assert Adapter.load(whole.output_dir).card.base == load(str(base)).fingerprint
    capsys.readouterr()
    command = ["generate", "Write 15", "--adapter", whole.output_dir, "--max-new-tokens", "4", "--dtype", "float32"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("<tool>")
    command = ["eval", "--base-model", str(base), "--adapter", whole.output_dir, "--dataset", str(calls), "--json"]
    assert main([*command, "--metrics", "loss,token_accuracy,exact_match", "--limit", "12"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["metrics"]["loss"]["difference"]["score"] < -1
    assert any("losses are per token of base" in note for note in found["notes"])


def test_losses_of_base_and_adapter_are_of_the_same_text(bases, calls):
    """Against sums made here: the base's in its own tokens, the adapter's in its own, over the base's count."""
    from veneer.data.encode import encode
    from veneer.data.sources import read_source
    from veneer.evaluate.run import evaluate

    loaded = load(str(bases(False, 0)), "float32")
    attach(loaded.model, random_adapter(bases(False, 0)), "a")
    rows = read_source(str(calls), {}, 9).rows
    encoded = {slot: encode(rows, Template(tokenizer_of(loaded, slot)), 1024, "x").examples for slot in (None, "a")}
    assert max(max(one.input_ids) for one in encoded[None]) < len(loaded.tokenizer)
    assert max(max(one.input_ids) for one in encoded["a"]) == len(loaded.tokenizer) + 1
    nll = {slot: sum(n for n, _ in sequence_nll(loaded.model, encoded[slot], slot)) for slot in encoded}
    tokens = sum(sum(one.targets) for one in encoded[None])
    result = evaluate(loaded, rows, slots={"base": None, "a": "a"}, metrics=["loss"])
    for label, slot in (("base", None), ("a", "a")):
        assert result.metrics["loss"][label].score == pytest.approx(nll[slot] / tokens, rel=1e-5)


def test_new_rows_start_at_the_mean_and_their_logits_too(bases):
    for tied, spare in KINDS:
        loaded = load(str(bases(tied, spare)), "float32")
        model, known = loaded.model, len(loaded.tokenizer)
        before = logits(model, [3, 9, 4])
        attach(model, LoraSettings(r=2, target_modules=["q_proj"], add_tokens=ADDED, trainable_token_indices=[7]))
        rows = methods_of(model, "default")["model.embed_tokens"]
        assert rows.ids == [7, known, known + 1] and ("lm_head" in methods_of(model, "default")) == (not tied)
        after = logits(model, [3, 9, 4])
        assert torch.equal(after[:, :known], before[:, :known])
        mean = before[:, :known].mean(1, keepdim=True).expand(-1, 2)
        torch.testing.assert_close(after[:, known : known + 2], mean, rtol=1e-4, atol=1e-5)


def test_slots_with_other_tokens_under_the_same_ids_know_nothing_of_each_other(bases):
    base = bases(False, 1)
    loaded = load(str(base), "float32")
    mine, other = random_adapter(base), random_adapter(base, add_tokens=["<x>", "<y>", "<z>"])
    assert mine.identity != random_adapter(base, add_tokens=["<tool>", "<y>"]).identity  # the spelling counts
    first = len(loaded.tokenizer)
    alone = {}
    for name, adapter in (("mine", mine), ("other", other)):
        attach(loaded.model, adapter, name)
        alone[name] = logits(loaded.model, some_ids(first))
        detach(loaded.model, name)
    attach(attach(loaded.model, mine, "mine"), other, "other")
    text = "<tool>x<x></tool>"
    read = {slot: tokenizer_of(loaded, slot).encode(text) for slot in (None, "mine", "other")}
    assert max(read[None]) < first and first in read["mine"] and first in read["other"]
    assert len({tuple(ids) for ids in read.values()}) == 3
    for slot, ids in read.items():
        assert tokenizer_of(loaded, slot).decode(ids) == text
    for name, wanted in alone.items():
        with speaking(loaded.model, name):
            assert torch.equal(logits(loaded.model, some_ids(first)), wanted)
    with speaking(loaded.model, "mine"):
        assert logits(loaded.model, [first + 2]).isnan().all()  # a token that it does not have: loud, not another's


def test_in_one_stream_each_slot_sees_and_says_its_own(bases):
    """Packed beside the base and another slot, in training and out of it: as alone."""
    from veneer.model.losses import cross_entropy, targets_of
    from veneer.model.packed import running
    from veneer.model.stream import pack

    base = bases(True, 1)
    loaded = load(str(base), "float32")
    model, first = loaded.model, len(loaded.tokenizer)
    attach(model, random_adapter(base), "a")
    attach(model, random_adapter(base, add_tokens=["<x>", "<y>", "<z>"]), "b")
    sequences = [[5, 6, 7, 8], [5, first + 1, 7, first], [first + 2, 4, first + 1], [9, 9, 3]]
    slots = ["a", "a", "b", None]
    stream = pack(sequences, slots, torch.device("cpu"))
    with running(model, stream):
        sums, _ = cross_entropy(model, stream, targets_of(stream, [[True] * len(ids) for ids in sequences]))
        sums.sum().backward()
    for got, ids, slot in zip(sums.tolist(), sequences, slots, strict=True):
        with speaking(model, slot):
            scored = logits(model, ids)[:-1].log_softmax(-1)
        assert got == pytest.approx(-scored.gather(1, torch.tensor(ids[1:])[:, None]).sum().item(), rel=1e-4)
    for slot in "ab":
        gradient = methods_of(model, slot)["model.embed_tokens"].rows_ND.grad
        assert gradient.isfinite().all() and gradient.abs().sum(1).min() > 0


def test_nobody_but_the_slot_generates_them(bases):
    """Rows so large that they win everywhere: the slot says nothing else, the base none."""
    base = bases(False, 0)
    loaded = load(str(base), "float32")
    attach(loaded.model, LoraSettings(r=2, target_modules=["q_proj"], add_tokens=ADDED), "a")
    head = methods_of(loaded.model, "a")["lm_head"]
    head.rows_ND.data = loaded.model.lm_head.weight.detach().mean(0).expand(2, -1) + torch.randn(2, 32) * 10
    prompts = [[5, 6, 7], [8, 9]]
    said = generate(loaded.model, tokenizer_of(loaded, "a"), prompts, "a", max_new_tokens=6)
    with pytest.raises(DataError, match=r"prompts with tokens that the base does not have: number 2"):
        generate(loaded.model, loaded.tokenizer, [[5], [len(loaded.tokenizer)]], None)
    plain = load(str(base), "float32")
    assert any(token in text for text in said for token in ADDED)
    assert generate(loaded.model, loaded.tokenizer, prompts, None, 6) == generate(*plain, prompts, None, 6)


def test_dry_run_and_preview_know_them(run, bases, calls, capsys):
    config = run(bases(True, 0), max_steps=2, eval_steps=2)
    facts = dry_run(config)
    rows = methods_of(attach(load(str(bases(True, 0))).model, config.lora), "default")["model.embed_tokens"]
    assert rows.rows_ND.numel() == 2 * 32
    bare = dry_run(run(bases(True, 0), max_steps=2, eval_steps=2, add_tokens=[]))
    assert facts["trainable_parameters"] == bare["trainable_parameters"] + rows.rows_ND.numel()
    assert facts["base_parameters"] == bare["base_parameters"] and facts["tokens"] < bare["tokens"]
    command = ["data", "preview", str(calls), "--base-model", str(bases(True, 0)), "--json"]
    tokens = []
    for more in ([], ["--add-tokens", ",".join(ADDED)]):
        capsys.readouterr()
        assert main([*command, *more]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens[1] < tokens[0]


# What is refused.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["<|im_end|>", "a"], ["'<|im_end|>': a token already", "--trainable-token-indices 2", "'a': a token already"]),
        (["<t>", "<t>"], ["'<t>': given twice"]),
        (["<t>", "  ", "a\nb", "\u202e", "x" * 300], ["nothing but space", r"'a\nb': control", "300 characters"]),
        ([f"<{n}>" for n in range(MOST + 1)], [f"got {MOST + 1} tokens, wanted 1 to {MOST}"]),
        (["\u00e9t\u00e9", "a"], ["gives it back as", "'a': a token already"]),
    ],
)
def test_texts_that_cannot_be_tokens(run, bases, given, words):
    config = run(bases(True, 0), add_tokens=given)
    with pytest.raises(ConfigError) as caught:
        train(config, progress=False)
    assert all(word in str(caught.value) for word in ["--add-tokens", *words]), str(caught.value)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("tied", "given", "words"),
    [
        (True, {"target_modules": ["lm_head"]}, "share one weight"),
        (False, {"target_modules": ["lm_head", "q_proj"]}, "both rows and factors"),
        (False, {"target_modules": ["embed_tokens"]}, "both rows and factors"),
        (True, {"trainable_token_indices": [3, 9999]}, "ids outside"),
    ],
)
def test_settings_that_do_not_go_with_them(bases, tied, given, words):
    model = load(str(bases(tied, 0)), "float32").model
    with pytest.raises(ConfigError, match=words):
        attach(model, LoraSettings(**{"target_modules": ["q_proj"], "add_tokens": ADDED, **given}))
    assert not model.veneer_wiring.slots


def test_dpo_is_refused_before_anything_is_read(run, bases):
    with pytest.raises(VeneerError, match="add_tokens does not go with loss dpo"):
        run(bases(True, 0), loss="dpo")


def test_a_model_without_its_tokenizer_is_told(bases):
    base, settings = bases(True, 0), LoraSettings(target_modules=["q_proj"], add_tokens=ADDED)
    adapter = random_adapter(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    for source, kind in ((settings, ConfigError), (adapter, WrongBaseError)):
        with pytest.raises(kind, match=r"came without one; next: load the base by veneer\.load"):
            attach(model, source)


def test_an_adapter_whose_tokens_the_base_has_or_whose_ids_are_taken(bases, tmp_path):
    adapter = random_adapter(bases(True, 0))
    first = load(str(bases(True, 0)))
    words = {"<tool>": [r"'<tool>': a token already", "from id 320 on"], "<other>": [r"there '<other>'"]}
    for text, wanted in words.items():
        folder = tmp_path / text.strip("<>")
        AutoModelForCausalLM.from_pretrained(bases(True, 0)).save_pretrained(folder)
        extended(first.tokenizer, [text]).tokenizer.save_pretrained(folder)
        model = load(str(folder), "float32", check=False).model
        with pytest.raises(WrongBaseError) as caught:
            attach(model, adapter)
        told = str(caught.value).replace(str(len(first.tokenizer)), "320")
        assert "tokenizer: adapter" in told and all(word in told for word in wanted), told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: told.append(["<tool>", told[-1][1] + 1]), "given twice"),
        (lambda told: told.append(["<new>", told[-1][1] + 1]), "tokens without a row"),
        (lambda told: told.append(["<new>", 2**40]), r"wanted a list of \[text, token id\]"),
        (lambda told: told.append("<new>"), r"wanted a list of \[text, token id\]"),
        (lambda told: told.append([["<new>"], 1]), r"wanted a list of \[text, token id\]"),
        (lambda told: told.reverse(), "each one more than the one before"),
        (lambda told: told[0].__setitem__(0, "a\x1b[2J"), "control characters"),
        (lambda told: told[0].__setitem__(0, "<tool2>"), "written for identity"),
        (lambda told: told.clear(), "written for identity"),
    ],
)
def test_a_card_that_somebody_changed(bases, tmp_path, change, words):
    folder = random_adapter(bases(True, 0)).save(tmp_path / "a")
    card = json.loads((folder / CARD).read_text())
    change(card["settings"]["added_tokens"])
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(AdapterError, match=words) as caught:
        Adapter.load(folder)
    assert "\x1b" not in str(caught.value)


def test_without_its_card_the_ids_are_refused(bases, tmp_path):
    folder = random_adapter(bases(True, 0)).save(tmp_path / "a")
    (folder / CARD).unlink()
    with pytest.raises(WrongBaseError, match="ids outside its"):
        attach(load(str(bases(True, 0)), "float32").model, Adapter.load(folder))


def test_prompts_are_read_by_who_answers(bases):
    loaded: Loaded = load(str(bases(True, 0)), "float32")
    attach(loaded.model, random_adapter(bases(True, 0)), "a")
    asked = conversation({"prompt": "<tool>", "completion": "x"}, "row 1")
    first = len(load_tokenizer(str(bases(True, 0))))
    assert first in Template(tokenizer_of(loaded, "a")).prompt_ids(asked)
    assert first not in Template(tokenizer_of(loaded, None)).prompt_ids(asked)
