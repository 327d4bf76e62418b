"""Our generator against transformers' own, token for token; sampling is a function of seed and row."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings
from veneer.errors import DataError, ModelError
from veneer.model.generate import _nucleus, end_tokens, generate, stream
from veneer.model.packed import speaking, wiring_of

VOCABULARY, END, PAD = 61, 2, 0


class Letters:
    """A tokenizer that writes every token as one visible character, so that texts are token ids."""

    eos_token_id = END
    pad_token_id = PAD

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(0x100 + i) for i in ids if not (skip_special_tokens and i == END))


@pytest.fixture(scope="module")
def model():
    """Weights large enough that the likeliest token wins by far; one slot, attached and so the voice."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlamaForCausalLM(config).eval()
        attach(made, LoraSettings(r=2))
        for method in methods_of(made, "default").values():
            nn.init.normal_(method.b_OR, 0, 0.3)
    return made


def prompts(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def by_transformers(model, prompt, slot, new: int) -> str:
    """One prompt alone through `model.generate`, greedy."""
    with speaking(model, slot):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0]
    return Letters().decode(ids[len(prompt) :].tolist(), skip_special_tokens=True)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    batch=st.integers(1, 6),
    slot=st.sampled_from([None, "default"]),
    seed=st.integers(0, 50),
)
def test_greedy_equals_transformers_token_for_token(model, lengths, batch, slot, seed):
    """Ragged prompts, any batch size; texts come back in the order of the prompts."""
    asked = prompts(lengths, seed)
    got = generate(model, Letters(), asked, slot, max_new_tokens=12, batch_size=batch)
    assert got == [by_transformers(model, prompt, slot, 12) for prompt in asked]


def test_families_with_absolute_positions_are_told_where_a_row_begins(model):
    """Rotary embeddings see differences of positions alone and would forgive counting the padding; GPT-2 would not."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=END)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = GPT2LMHeadModel(config).eval()
    asked = prompts([2, 9, 5])
    assert generate(other, Letters(), asked, None, 12) == [by_transformers(other, prompt, None, 12) for prompt in asked]


def test_base_and_slot_say_different_things(model):
    asked = prompts([3, 5, 7])
    assert wiring_of(model).voice == "default"
    base, slot = (generate(model, Letters(), asked, s, 12) for s in (None, "default"))
    assert base != slot
    assert wiring_of(model).voice == "default"


def test_rows_that_end_early_leave_and_the_others_go_on(model):
    """The end token is made the third word of one row; every row must still be that of transformers."""
    asked = prompts([4, 9, 6, 2])
    third = ord(by_transformers(model, asked[1], None, 12)[2]) - 0x100
    held = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [END, third]
    try:
        assert end_tokens(model, Letters()) == {END, third}
        wanted = [by_transformers(model, prompt, None, 12) for prompt in asked]
        wanted = [text.split(chr(0x100 + third))[0] for text in wanted]
        assert generate(model, Letters(), asked, None, 12, batch_size=4) == wanted
        assert len({len(text) for text in wanted}) > 1 and len(wanted[1]) <= 2
    finally:
        model.generation_config.eos_token_id = held


def test_a_row_that_ends_at_once_is_empty(model):
    asked = prompts([4])
    first = ord(by_transformers(model, asked[0], None, 1)) - 0x100
    tokenizer = Letters()
    tokenizer.eos_token_id = first
    assert generate(model, tokenizer, asked, None, 12) == [""]
    assert list(stream(model, tokenizer, asked[0], None, 12)) == []


@pytest.mark.parametrize("new", [0, 1, 5])
def test_no_more_tokens_than_asked_for(model, new):
    assert [len(text) for text in generate(model, Letters(), prompts([4, 2]), None, new)] == [new, new]


def test_no_prompts_no_texts(model):
    assert generate(model, Letters(), [], None) == []


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_stream_says_what_generate_says(model, temperature):
    for prompt in prompts([1, 4, 9]):
        pieces = list(stream(model, Letters(), prompt, "default", 12, temperature=temperature, seed=3))
        assert all(pieces)
        assert (
            "".join(pieces) == generate(model, Letters(), [prompt], "default", 12, temperature=temperature, seed=3)[0]
        )
    assert len(pieces) > 1


def test_stream_lets_others_speak_between_its_pieces(model):
    """A chat that shows a piece may ask the model something else before the next one."""
    prompt = prompts([5])[0]
    wanted = generate(model, Letters(), [prompt], "default", 8)[0]
    said = ""
    for piece in stream(model, Letters(), prompt, "default", 8):
        generate(model, Letters(), [prompt], None, 2)
        assert wiring_of(model).voice == "default"
        with speaking(model, None):
            said += piece
    assert said == wanted


def test_stream_never_ends_a_piece_inside_a_character(model):
    class Bytes(Letters):
        """Every token is one byte of a two-byte character."""

        def decode(self, ids, skip_special_tokens=False):
            return bytes(b for i, _ in enumerate(ids) for b in ([0xC3] if i % 2 == 0 else [0xA9])).decode(
                errors="replace"
            )

    prompt = prompts([5])[0]
    assert set(stream(model, Bytes(), prompt, None, 8)) == {"é"}
    assert "".join(stream(model, Bytes(), prompt, None, 7)) == "ééé\ufffd"  # cut by the limit: said as it is


# Sampling.


def test_the_same_seed_gives_the_same_text_and_another_another(model):
    asked = prompts([4, 6])
    texts = [generate(model, Letters(), asked, None, 12, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5), batch=st.integers(1, 5), seed=st.integers(0, 9))
def test_a_sampled_text_does_not_depend_on_its_batch(model, lengths, batch, seed):
    asked = prompts(lengths)
    whole = generate(model, Letters(), asked, None, 8, temperature=1.0, top_p=0.9, seed=seed, batch_size=8)
    assert generate(model, Letters(), asked, None, 8, temperature=1.0, top_p=0.9, seed=seed, batch_size=batch) == whole


def test_equal_prompts_are_sampled_apart(model):
    texts = generate(model, Letters(), prompts([4]) * 6, None, 12, temperature=2.0)
    assert len(set(texts)) > 1


def test_torchs_own_generator_has_no_part_in_it(model):
    asked, before = prompts([4]), torch.random.get_rng_state()
    first = generate(model, Letters(), asked, None, 8, temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(77)
    assert generate(model, Letters(), asked, None, 8, temperature=1.0) == first


def test_frequencies_are_the_models_at_that_temperature(model):
    """1,000 first tokens against softmax(logits / 2), chi-squared over the tokens with at least 5 expected."""
    prompt, temperature, n = prompts([4])[0], 2.0, 1000
    texts = generate(model, Letters(), [prompt] * n, None, 1, temperature=temperature, batch_size=n)
    counts = torch.zeros(VOCABULARY)
    for text in texts:
        counts[ord(text) - 0x100 if text else END] += 1
    with torch.no_grad(), speaking(model, None):
        probs = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    often = probs * n >= 5
    statistic = ((counts - probs * n) ** 2 / (probs * n))[often].sum().item()
    freedom = int(often.sum())
    assert freedom > 5
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # mean + 5 standard deviations


@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12),
    top_p=st.floats(0.05, 0.99),
    extra=st.integers(0, 2),
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p, extra):
    probs = torch.tensor([logits] * (1 + extra)).softmax(-1)
    kept = _nucleus(probs, top_p)
    assert torch.equal(kept[kept > 0], probs[kept > 0])  # what is kept is unchanged
    for row, whole in zip(kept, probs, strict=True):
        chosen = row > 0
        count, mass = int(chosen.sum()), row.sum().item()
        assert count >= 1
        assert mass >= top_p - 1e-5 or count == len(row)
        if count < len(row):
            assert row[chosen].min() >= whole[~chosen].max()  # the likeliest ones
        assert count == 1 or mass - row[chosen].min().item() < top_p + 1e-5  # none too many


def test_a_tiny_top_p_is_greedy(model):
    asked = prompts([4, 7, 2])
    sampled = generate(model, Letters(), asked, None, 12, temperature=1.0, top_p=1e-6, seed=5)
    assert sampled == generate(model, Letters(), asked, None, 12)


def test_an_unknown_slot_is_refused(model):
    with pytest.raises(ModelError, match=r"nobody.*default"):
        generate(model, Letters(), prompts([3]), "nobody", 2)


def test_an_empty_prompt_is_refused(model):
    """There is no token to go on from; a padding token in its place would be somebody else's prompt."""
    with pytest.raises(DataError, match="number 2; each needs at least one token"):
        generate(model, Letters(), [[3, 4], []], None, 2)


def test_an_abandoned_stream_leaves_the_model_as_it_was(model):
    pieces = stream(model, Letters(), prompts([4])[0], None, 12)
    list(itertools.islice(pieces, 2))
    pieces.close()
    assert wiring_of(model).voice == "default" and wiring_of(model).stream is None
    assert torch.is_grad_enabled()


def test_a_stream_does_not_switch_gradients_off_between_its_pieces(model):
    for _ in stream(model, Letters(), prompts([4])[0], None, 3):
        assert torch.is_grad_enabled()


@pytest.mark.slow
def test_the_real_model_says_what_transformers_says(smollm2):
    """fp32, a prompt of the demo's kind; near ties could differ, so the prompts are fixed ones without."""
    model, tokenizer = smollm2
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in ("What is the capital of France?", "Name a colour.")
    ]
    got = generate(model, tokenizer, asked, None, 12)
    wanted = []
    for prompt in asked:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0]
        wanted.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert got == wanted and all(wanted)
