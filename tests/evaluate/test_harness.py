"""Results of lm_eval as ours, and its requests on a pico model; the latter only where lm_eval is installed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from veneer.errors import ConfigError
from veneer.evaluate.harness import _result, check_installed


def results(acc, perplexity):
    """What lm_eval.simple_evaluate returns: a task of right and wrong rows, and one whose score is no mean of rows."""
    return {
        "results": {
            "arc_easy": {"alias": "arc_easy", "acc,none": sum(acc) / len(acc), "acc_stderr,none": "N/A"},
            "wikitext": {"alias": "wikitext", "word_perplexity,none": perplexity, "word_perplexity_stderr,none": "N/A"},
            "gsm8k": {"exact_match,strict": 0.5, "exact_match,loose": 1.0},
        },
        "samples": {
            "arc_easy": [{"doc_id": i, "filter": "none", "acc": value} for i, value in enumerate(acc)],
            "wikitext": [{"doc_id": 0, "filter": "none", "word_perplexity": (-10.0, 5)}],
            "gsm8k": [
                {"doc_id": i, "filter": kind, "exact_match": value}
                for kind, values in {"strict": (0.0, 1.0), "loose": (1.0, 1.0)}.items()
                for i, value in enumerate(values)
            ],
        },
        "n-samples": {"arc_easy": {"original": 8, "effective": len(acc)}},
    }


def test_means_of_rows_get_intervals_and_paired_differences_the_rest_stands_alone():
    before, after = results([0, 1] * 4, 30.0), results([1] * 7 + [0], 20.0)
    found = _result({"base": before, "adapter": after}, {}, 0)
    assert list(found.metrics) == [
        "arc_easy/acc",
        "wikitext/word_perplexity",
        "gsm8k/exact_match,strict",
        "gsm8k/exact_match,loose",
    ]
    acc = found.metrics["arc_easy/acc"]["adapter"]
    assert acc.low < acc.score == 0.875 < acc.high
    change = found.differences["arc_easy/acc"]["adapter"]
    assert change.score == pytest.approx(0.375) and change.low < 0.375 < change.high
    perplexity = found.differences["wikitext/word_perplexity"]["adapter"]
    assert (perplexity.score, perplexity.low, perplexity.high, perplexity.n) == (-10.0, None, None, 1)
    assert found.metrics["gsm8k/exact_match,strict"]["base"].score == 0.5
    assert found.metrics["gsm8k/exact_match,loose"]["base"].low < 1  # right in all rows: Wilson's bound
    assert found.rows == 8


def test_a_missing_harness_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        check_installed()


@pytest.fixture
def harness(pico):
    """The base of a pico model as lm_eval sees it; its tokenizer has a token for each character."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from veneer.evaluate.harness_model import HarnessModel

    class Letters:
        bos_token, bos_token_id, eos_token_id, name_or_path = None, None, 2, "letters"

        def encode(self, text, add_special_tokens=True):
            return [3 + ord(letter) % 90 for letter in text]

        def decode(self, ids, skip_special_tokens=True):
            return "".join(chr(97 + i % 26) for i in ids)

    return HarnessModel(SimpleNamespace(model=pico, tokenizer=Letters()), None)


def asked(*args):
    return SimpleNamespace(args=args)


def log_p(model, ids, scored):
    """Σ log p of the last `scored` ids, from the model's own forward."""
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return sum(rows[place - 1, ids[place]].item() for place in range(len(ids) - scored, len(ids)))


def test_loglikelihood_of_a_continuation(harness):
    encode = harness.tokenizer.encode
    first, second, alone = harness.loglikelihood([asked("abc", " de"), asked("abc", " f"), asked("", "xyz")])
    assert first[0] == pytest.approx(log_p(harness.model, encode("abc de"), 3), rel=1e-4)
    assert second[0] == pytest.approx(log_p(harness.model, encode("abc f"), 2), rel=1e-4)
    assert alone[0] == pytest.approx(log_p(harness.model, [2, *encode("xyz")], 3), rel=1e-4)
    with torch.no_grad():
        said = harness.model(torch.tensor([encode("abc")])).logits[0, -1].argmax().item()
    assert harness._loglikelihood_tokens([(None, encode("abc"), [said])])[0][1] is True
    assert harness._loglikelihood_tokens([(None, encode("abc"), [(said + 1) % 96])])[0][1] is False


def test_rolling_scores_every_token_once_in_windows(harness):
    harness.max_length = 8
    (total,) = harness.loglikelihood_rolling([asked("abcdefghijkl")])
    ids = [2, *harness.tokenizer.encode("abcdefghijkl")]
    # Twelve tokens in windows of eight: the first eight after the start token, the last four with what fits before.
    assert total == pytest.approx(log_p(harness.model, ids[:9], 8) + log_p(harness.model, ids[4:13], 4), rel=1e-4)
    assert math.isfinite(total)


def test_generation_stops_where_it_is_told(harness):
    prompts = list("abcdefghijkl")
    texts = harness.generate_until([asked(prompt, {"until": [], "max_gen_toks": 6}) for prompt in prompts])
    prompt, whole = next(pair for pair in zip(prompts, texts, strict=True) if len(pair[1]) > 3)  # some end at once
    stop = whole[2]
    cut, same = harness.generate_until(
        [asked(prompt, {"until": [stop], "max_gen_toks": 6}), asked(prompt, {"max_gen_toks": 3, "do_sample": False})]
    )
    assert cut == whole.split(stop)[0] and same == whole[:3]


@pytest.mark.parametrize(
    "options, words", [({"do_sample": True}, "do_sample=True"), ({"repetition_penalty": 2}, "repetition_penalty")]
)
def test_what_is_not_greedy_is_refused(harness, options, words):
    with pytest.raises(ConfigError, match=words):
        harness.generate_until([asked("abc", options)])
