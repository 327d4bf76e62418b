"""The run over a data file, with a stub tokenizer, stub generator and stub likelihood: what is asked of them, and
what is made of their answers."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from veneer.config import EvalSettings
from veneer.errors import ConfigError, DataError, ModelError
from veneer.evaluate import verb
from veneer.evaluate.run import Result, evaluate
from veneer.model.likelihood import Likelihood

ROWS = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(20)]


class Letters:
    """A tokenizer of one token a character, with a chat template and an end token."""

    chat_template = "as apply_chat_template has it"
    name_or_path = "letters"
    eos_token, eos_token_id, bos_token_id = "[end]", 0, None

    def __init__(self):
        self.all_special_ids, self.added_tokens_decoder = [0], {}

    def __call__(self, texts, **_):
        one = isinstance(texts, str)
        ids = [
            [0 if part == "[end]" else ord(part) for part in self._parts(text)] for text in ([texts] if one else texts)
        ]
        return {"input_ids": ids[0] if one else ids}

    def _parts(self, text):
        return re.findall(r"\[end\]|.", text, re.DOTALL)

    def decode(self, ids):
        return "".join("[end]" if i == 0 else chr(i) for i in ids)

    def apply_chat_template(self, batch, chat_template=None, tokenize=False, add_generation_prompt=False):
        def text(messages):
            turns = "".join(f"[{m['role']}]{m['content']}[end]" for m in messages)
            return turns + ("[assistant]" if add_generation_prompt else "")

        return [text(messages) for messages in batch]


class Callers(Letters):
    """As `Letters`, with a template that spells tools and calls, and a decoder that skips the end token."""

    def decode(self, ids, skip_special_tokens=False):
        text = super().decode(ids)
        return text.replace("[end]", "") if skip_special_tokens else text

    def apply_chat_template(self, batch, tools=(), add_generation_prompt=False, **_):
        spelt = [[_spelt(message) for message in messages] for messages in batch]
        texts = super().apply_chat_template(spelt, add_generation_prompt=add_generation_prompt)
        return ["".join(f"[tool]{tool['function']['name']}" for tool in tools) + text for text in texts]


def _spelt(message):
    return {**message, "content": message["content"] + "".join(map(str, message.get("tool_calls", ())))}


LOADED = SimpleNamespace(model="the model", tokenizer=Letters(), name="stub", storage="dense float32")


def answering(**right):
    """A generator that is right on the first `right[slot]` rows; it notes its calls."""
    calls = []

    def generate(model, tokenizer, prompts, slot, max_new_tokens, temperature=1.0, batch_size=0):
        calls.append((model, slot, max_new_tokens, temperature, batch_size, [tokenizer.decode(p) for p in prompts]))
        return [str(n + 1) if n < right[slot or "base"] else "I do not know" for n in range(len(prompts))]

    generate.calls = calls
    return generate


def likelihood(**nats):
    """nats[slot] for each target token, a little more on later rows."""

    def likelihoods(model, examples, slot):
        counts = [sum(example.targets) for example in examples]
        return [Likelihood(n * (nats[slot or "base"] + 0.01 * row), n, n // 2) for row, n in enumerate(counts)]

    return likelihoods


def unused(*_, **__):
    raise AssertionError("must not be called")


def test_text_metrics_before_and_after():
    generate = answering(base=4, default=18)
    found = evaluate(LOADED, ROWS, metrics=["exact_match"], max_new_tokens=9, generate=generate, likelihoods=unused)
    assert [s.score for s in found.metrics["exact_match"].values()] == [0.2, 0.9]
    difference = found.differences["exact_match"]["adapter"]
    assert difference.score == pytest.approx(0.7)
    assert 0.4 < difference.low < 0.7 < difference.high < 1.0
    (model, slot, tokens, temperature, _, prompts), (_, second, *_) = generate.calls
    assert (model, slot, second, tokens, temperature) == ("the model", None, "default", 9, 0.0)
    assert prompts[3] == "[user]3 + 1[end][assistant]"


def test_samples_hold_what_was_written_and_what_became_of_it():
    found = evaluate(LOADED, ROWS, metrics=["exact_match"], generate=answering(base=3, default=2), likelihoods=unused)
    sample = found.samples[2]
    assert (sample.prompt, sample.references) == ("2 + 1", ("3",))
    assert sample.texts == {"base": "3", "adapter": "I do not know"}
    outcomes = [s.outcome("exact_match", "base", "adapter") for s in found.samples]
    assert outcomes == ["right"] * 2 + ["broken"] + ["wrong"] * 17
    assert sample.outcome("exact_match", "adapter", "base") == "fixed"


def test_likelihood_metrics_generate_nothing():
    found = evaluate(LOADED, ROWS, generate=unused, likelihoods=likelihood(base=3.0, default=0.5))
    assert list(found.metrics) == ["loss", "perplexity"]
    assert found.samples == ()
    loss = found.metrics["loss"]
    assert loss["base"].low < loss["base"].score < loss["base"].high
    assert found.differences["loss"]["adapter"].score == pytest.approx(-2.5)
    assert found.differences["perplexity"]["adapter"].high < 0


def test_json_round_trip_and_the_promised_layout():
    found = evaluate(
        LOADED,
        ROWS,
        metrics=["exact_match", "loss"],
        generate=answering(base=1, default=19),
        likelihoods=likelihood(base=3.0, default=0.5),
        where="test.jsonl",
    )
    spelt = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(spelt["metrics"]["exact_match"]) == {"base", "adapter", "difference"}
    assert set(spelt["metrics"]["exact_match"]["difference"]) == {"score", "low", "high", "n"}
    assert (spelt["rows"], spelt["settings"]["dataset"]) == (20, "test.jsonl")
    assert Result.from_json(spelt) == found
    assert "examples" not in found.to_json(examples=False)


@pytest.mark.parametrize("slots", [{"base": None}, {"base": None, "one": "default", "two": "second"}])
def test_one_slot_or_three(slots):
    generate = answering(base=1, default=10, second=20)
    found = evaluate(LOADED, ROWS, slots=slots, metrics=["accuracy"], generate=generate, likelihoods=unused)
    spelt = found.to_json()["metrics"]["accuracy"]
    assert set(spelt) == {*slots, *(["differences"] if len(slots) == 3 else [])}
    assert list(found.differences["accuracy"]) == list(slots)[1:]
    assert Result.from_json(found.to_json()) == found


def test_system_prompt_references_and_earlier_turns_reach_the_model():
    generate = answering(base=0)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}]
    rows.append({"prompt": "p", "completion": "x", "references": ["y", "I do not know"]})
    found = evaluate(
        LOADED,
        rows,
        slots={"base": None},
        metrics=["exact_match"],
        system_prompt="Be short.",
        generate=generate,
        likelihoods=unused,
    )
    prompts = generate.calls[0][-1]
    assert prompts[0] == "[system]Be short.[end][user]a[end][assistant]b[end][user]c[end][assistant]"
    assert found.samples[0].prompt == "user: a\n\nassistant: b\n\nuser: c"
    assert [s.scores["exact_match"]["base"] for s in found.samples] == [0.0, 1.0]


@pytest.mark.parametrize("metric", ["exact_match", "loss"])
def test_an_instruction_put_before_the_prompt_is_said(metric):
    rows = [{"instruction": "Add.", "prompt": "1 + 1", "completion": "2"}]
    stubs = {"generate": answering(base=0), "likelihoods": likelihood(base=1.0)}
    found = evaluate(LOADED, rows, slots={"base": None}, metrics=[metric], **stubs)
    assert [note for note in found.notes if "`instruction` stands before the prompt" in note]


def test_progress_is_told():
    said = []
    stubs = {"generate": answering(base=0, default=0), "likelihoods": likelihood(base=1.0, default=1.0)}
    evaluate(LOADED, ROWS, metrics=["loss", "accuracy"], progress=said.append, **stubs)
    assert said == [
        "base: loss of 20 rows",
        "adapter: loss of 20 rows",
        "base: generating 20 answers",
        "adapter: generating 20 answers",
    ]


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"metrics": ["exact_mach"]}, ConfigError, "did you mean exact_match"),
        ({"metrics": []}, ConfigError, "no metric"),
        ({"slots": {}}, ConfigError, "no slot"),
        ({"slots": {"difference": None}}, ConfigError, "may not be called 'difference'"),
        ({"rows": []}, DataError, "test.jsonl has no rows"),
        ({"rows": [*ROWS, {"prompt": "a"}, {"completion": "b"}]}, DataError, r"2 of 22 rows(.|\n)*row 21(.|\n)*row 22"),
        ({"rows": [*ROWS, {"prompt": "a"}], "metrics": ["loss"]}, DataError, "row 21"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, error, words):
    arguments = {"rows": ROWS, "metrics": ["exact_match"], "where": "test.jsonl", **change}
    with pytest.raises(error, match=words):
        evaluate(LOADED, arguments.pop("rows"), generate=unused, likelihoods=unused, **arguments)


def test_a_loss_that_is_no_number_names_slot_and_rows():
    def likelihoods(model, examples, slot):
        return [Likelihood(float("nan") if slot and row in (3, 8) else 1.0, 1, 0) for row in range(len(examples))]

    with pytest.raises(ModelError, match=r"'adapter' is not finite on 2 of 20 rows \(row 4, 9\)"):
        evaluate(LOADED, ROWS, generate=unused, likelihoods=likelihoods)


def test_text_has_a_loss_and_no_answers():
    rows = [{"text": "one two three"}, {"text": "four"}]
    result = evaluate(
        LOADED, rows, metrics=["loss"], max_length=5, generate=unused, likelihoods=likelihood(base=2, default=1)
    )
    assert result.metrics["loss"]["base"].n == -(-(len("one two threefour") + 2 - 1) // 4)  # chunks share a token
    assert any("2 documents" in note for note in result.notes)
    with pytest.raises(DataError, match=r"exact_match cannot be measured\. Next: --metrics loss,perplexity"):
        evaluate(LOADED, rows, metrics=["loss", "exact_match"], generate=unused, likelihoods=unused)


def test_without_metrics_asked_for_text_gets_those_it_can_have(tmp_path, monkeypatch):
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n')
    asked = []
    monkeypatch.setattr(verb, "load", lambda *_, **__: LOADED)
    monkeypatch.setattr(verb, "evaluate", lambda *_, metrics, **__: asked.append(list(metrics)))
    given = {"base_model": "m", "dataset": str(tmp_path / "text.jsonl")}
    verb.evaluate_files(EvalSettings(**given))
    verb.evaluate_files(EvalSettings(**given, metrics=["exact_match"]))
    assert asked == [["loss", "perplexity"], ["exact_match"]]


def test_preference_pairs_are_refused_by_name():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(DataError, match="holds preference pairs"):
        evaluate(LOADED, rows, generate=unused, likelihoods=unused)


def test_a_call_of_tools_is_right_as_the_template_spells_it():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    prompts = []

    def generate(model, tokenizer, asked, slot, *_, **__):
        prompts.extend(map(tokenizer.decode, asked))
        return [str(call) if slot else "f()"]

    loaded = SimpleNamespace(**{**vars(LOADED), "tokenizer": Callers()})
    rows = [{"messages": turns, "tools": [{"name": "f"}]}]
    result = evaluate(loaded, rows, metrics=["exact_match"], generate=generate, likelihoods=unused)
    assert prompts == ["[tool]f[user]q[end][assistant]"] * 2
    assert result.samples[0].references == (str(call),)
    assert result.samples[0].scores["exact_match"] == {"base": 0.0, "adapter": 1.0}


QUESTIONS = [{"question": f"{n}?", "choices": ["a long wrong one", "yes"], "answer": n % 2} for n in range(6)]


def choosing(model, examples, slot):
    """The base likes the shorter of two choices, though a character of the long one better; the adapter knows."""
    found = []
    for example in examples:
        short, scored = sum(example.targets) == 3, "".join(map(chr, example.input_ids))
        right = short == (int(re.search(r"(\d)\?", scored)[1]) % 2 == 1)
        nats = (1.0 if right else 9.0) if slot else (1.0 if short else 2.0)
        found.append(Likelihood(nats, sum(example.targets), 0))
    return found


def test_choices_are_scored_without_the_end_of_turn_and_compared():
    seen = []

    def likelihoods(model, examples, slot):
        seen.extend(examples)
        return choosing(model, examples, slot)

    names = ["choice_accuracy", "choice_accuracy_norm"]
    found = evaluate(LOADED, QUESTIONS, metrics=names, generate=unused, likelihoods=likelihoods)
    text = "".join(map(chr, seen[0].input_ids))
    assert text.endswith("a long wrong one") and chr(0) in text  # the prompt's own end marks stay
    assert sum(seen[0].targets) == len("a long wrong one")
    assert [score.score for score in found.metrics["choice_accuracy"].values()] == [0.5, 1.0]
    # 2 nats over 16 characters beat 1 over 3: the base picks the long one.
    assert [one.scores["choice_accuracy_norm"]["base"] for one in found.samples] == [1.0, 0.0] * 3
    assert found.differences["choice_accuracy"]["adapter"].score == 0.5
    sample = found.samples[0]
    assert (sample.prompt, sample.references, sample.choices) == (
        "0?",
        ("a long wrong one",),
        tuple(QUESTIONS[0]["choices"]),
    )
    assert sample.texts == {"base": "yes", "adapter": "a long wrong one"}
    assert sample.loglikelihoods == {"base": (-2.0, -1.0), "adapter": (-1.0, -9.0)}
    assert Result.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_all_kinds_of_metrics_in_one_evaluation():
    names = ["choice_accuracy", "exact_match", "token_accuracy", "loss", "chrf"]
    generate = answering(base=0, default=0)
    found = evaluate(LOADED, QUESTIONS, metrics=names, generate=generate, likelihoods=choosing)
    assert list(found.metrics) == names and found.samples[0].texts["base"] == "I do not know"
    assert set(found.samples[0].scores) == {"choice_accuracy", "exact_match", "chrf"}
    assert found.metrics["token_accuracy"]["base"].score == 0.0
    assert found.metrics["token_accuracy"]["base"].high < 1  # of all rows alike: Wilson's bound


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a", "completion": "b"}, r"row 7: `choices` is null"),
        ({"question": "a", "choices": ["b", "c" * 2000], "answer": 0}, "row 7, choice 'cc.*longer than 1,024 tokens"),
    ],
)
def test_a_row_that_is_no_multiple_choice_is_named(row, words):
    with pytest.raises(DataError, match=words):
        evaluate(LOADED, [*QUESTIONS, row], metrics=["choice_accuracy"], likelihoods=unused)


def test_a_function_of_ones_own_is_tried_before_anything_is_generated(tmp_path):
    (tmp_path / "mine.py").write_text("def broken(predictions, references):\n    return []\n")
    with pytest.raises(ConfigError, match="returned 0 values, wanted a list of 1 numbers"):
        evaluate(LOADED, ROWS, metrics=[f"{tmp_path / 'mine.py'}:broken"], generate=unused)


@pytest.mark.slow
def test_choices_are_scored_as_a_plain_loop_over_the_models_own_forward(smollm2, shared_data):
    """Twenty real questions, float32: each choice alone through transformers, summed over its own tokens."""
    lines = (shared_data / "multiple_choice" / "arc_easy_test.jsonl").read_text("utf-8").splitlines()[:20]
    rows = [json.loads(line) for line in lines]
    found = evaluate(smollm2, rows, slots={"base": None}, metrics=["choice_accuracy", "choice_accuracy_norm"])
    tokenizer, wanted = smollm2.tokenizer, {"choice_accuracy": 0, "choice_accuracy_norm": 0}
    for row, sample in zip(rows, found.samples, strict=True):
        turns = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        texts = [prompt + choice for choice in row["choices"]]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        ids, ends = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
        with torch.no_grad():
            log_p = smollm2.model(**batch).logits[:, before - 1 : -1].log_softmax(-1)
        of_tokens = log_p.gather(2, ids[:, before:, None])[:, :, 0]
        alone = [row[: end - before].sum().item() for row, end in zip(of_tokens, ends, strict=True)]
        # Sums of up to some thirty tokens of about -5 each, in float32.
        assert sample.loglikelihoods["base"] == pytest.approx(alone, rel=1e-4, abs=1e-3)
        per_character = [total / len(choice) for total, choice in zip(alone, row["choices"], strict=True)]
        wanted["choice_accuracy"] += alone.index(max(alone)) == row["answer"]
        wanted["choice_accuracy_norm"] += per_character.index(max(per_character)) == row["answer"]
    assert {name: scores["base"].score * 20 for name, scores in found.metrics.items()} == pytest.approx(wanted)
