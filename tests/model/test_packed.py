"""The packed forward against each sequence alone: transformers' own code and attention, the updates as dense weights.

The oracle shares nothing with the packed path: a second, unswapped model of the same weights, called once for every
sequence with `torch.func.functional_call`, each adapted weight replaced by W + s·B·A; autograd does the rest.
"""

from __future__ import annotations

import copy
import functools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from tests.families import SIZES, config_of, gemma3, gpt2, llava, model_of, qwen2_vl
from veneer.adapter.attach import attach, detach, methods_of
from veneer.config import LoraSettings
from veneer.errors import ModelError, VeneerError
from veneer.model import attention, segments
from veneer.model.head import head_of
from veneer.model.leaf import Leaf
from veneer.model.load import prepare
from veneer.model.packed import hidden_states, running, speaking, wiring_of
from veneer.model.probe import probe
from veneer.model.scores import Scores
from veneer.model.stream import Span, Stream, pack

FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, every head its own key": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "llama, tied head": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, a window": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, a window in one layer": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma": config_of("gemma", head_dim=8),
    # Caps small enough to bend the scores and logits of a random model.
    "gemma2": config_of(
        "gemma2",
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": config_of("gemma3_text", head_dim=8, sliding_window=8, query_pre_attn_scalar=8, sliding_window_pattern=2),
    "olmo2": config_of("olmo2"),
    "granite, scaled logits": config_of(
        "granite", logits_scaling=4.0, attention_multiplier=0.2, residual_multiplier=0.5
    ),
    "cohere, scaled logits": config_of("cohere", logit_scale=0.25),
    "smollm3": config_of("smollm3"),
    "phi3, q, k and v in one": config_of("phi3"),
    "gpt_neox": config_of("gpt_neox"),
    "gpt2, layers stored transposed, learned positions": gpt2(),
    # Their layers do not hand on to attention what they are given.
    "stablelm": config_of("stablelm"),
    "nemotron": config_of("nemotron"),
    "deepseek_v3, latent attention, experts": config_of(
        "deepseek_v3",
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "gemma3, which sees": gemma3(),
    "llava, which sees": llava(),
    "qwen2_vl, which sees": qwen2_vl(),
    "starcoder2": config_of("starcoder2", sliding_window=8),
    "gpt_oss, sinks": config_of("gpt_oss", head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
    "mixtral, experts": config_of("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe, experts": config_of("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
# What each slot adapts: "one" and "two" meet in the attention, "two" alone has no method in the MLP.
TARGETS = {"one": ["q_proj", "v_proj", "down_proj", "gate_proj"], "two": ["q_proj", "k_proj", "o_proj"]}
ATTENTION_ALONE = {"one": ["q_proj", "v_proj"], "two": TARGETS["two"]}
# The same where layers have other names.
OTHER_TARGETS = {
    "phi3": {"one": ["qkv_proj", "down_proj"], "two": ["qkv_proj", "o_proj"]},
    "gpt2": {"one": ["c_attn", "mlp.c_proj"], "two": ["c_attn", "attn.c_proj", "c_fc"]},
    "gpt_neox": {"one": ["query_key_value", "dense_4h_to_h"], "two": ["query_key_value", "dense"]},
    "starcoder2": {"one": ["q_proj", "v_proj", "c_fc"], "two": TARGETS["two"]},
    "nemotron": {"one": ["q_proj", "v_proj", "down_proj"], "two": TARGETS["two"]},
    "deepseek_v3": {"one": ["q_b_proj", "kv_b_proj", "down_proj"], "two": ["kv_b_proj", "o_proj"]},
    "gpt_oss": ATTENTION_ALONE,  # experts are no linear layers
    "mixtral": ATTENTION_ALONE,
    "qwen3_moe": ATTENTION_ALONE,
}
SCALES = {"one": 2.0, "two": 0.7}


@functools.cache
def plain(family: str) -> nn.Module:
    """A random model of the family as transformers makes it; biases and norms are random too, not 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_of(FAMILIES[family])
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 1.0, 0.3)
            parameter.requires_grad_(False)
    return model


def adapted(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model with norms swapped and the two slots filled, B random; one for all tests."""
    return _adapted(family, dtype)


@functools.cache
def _adapted(family: str, dtype: torch.dtype) -> nn.Module:
    model = copy.deepcopy(plain(family)).to(dtype)
    prepare(model)
    generator = torch.Generator().manual_seed(1)
    for name, targets in OTHER_TARGETS.get(model.config.model_type, TARGETS).items():
        attach(model, LoraSettings(r=3, scale=SCALES[name], target_modules=targets), name)
        for method in methods_of(model, name).values():
            method.b_OR.data = torch.randn(method.b_OR.shape, generator=generator) * 0.2
    return model


def logits_alone(
    model: nn.Module, ids: list[int], slots: dict[str, float], factors: dict[str, dict[str, tuple[Tensor, Tensor]]]
) -> Tensor:
    """(T, V) of one sequence through transformers' own attention, `slots` (name -> weight) added to the weights."""
    weights = {}
    for slot, weight in slots.items():
        for path, (a_RI, b_OR) in factors[slot].items():
            layer = model.get_submodule(path)
            held, update_OI = weights.get(f"{path}.weight", layer.weight), weight * SCALES[slot] * b_OR @ a_RI
            update = update_OI.t() if isinstance(layer, Conv1D) else update_OI
            weights[f"{path}.weight"] = held + update.to(held.dtype)
    inputs = {"input_ids": torch.tensor([ids]), "use_cache": False}
    return torch.func.functional_call(model, weights, kwargs=inputs).logits[0]


def both(family: str, sequences, speakers, spans=None, dtype=torch.float32, oracle=None):
    """(logits, gradients) packed and alone; speakers[i]: slot -> weight; gradients by slot, path and factor."""
    model = adapted(family, dtype)
    oracle = plain(family) if oracle is None else oracle
    generator = torch.Generator().manual_seed(2)
    loss_weights = [torch.randn(len(ids), SIZES["vocab_size"], generator=generator) for ids in sequences]
    model.zero_grad()
    stream = pack(sequences, [next(iter(who), None) for who in speakers])
    if spans is not None:
        stream = Stream(stream.token_ids_T, stream.positions_T, stream.lengths, tuple(spans))
    with running(model, stream):
        logits_TV = head_of(model)(hidden_states(model))
        if logits_TV.requires_grad:
            (logits_TV.float() * torch.cat(loss_weights)).sum().backward()
    factors = {
        slot: {
            path: (method.a_RI.detach().clone().requires_grad_(), method.b_OR.detach().clone().requires_grad_())
            for path, method in methods_of(model, slot).items()
        }
        for slot in TARGETS
    }
    wanted = [logits_alone(oracle, ids, who, factors) for ids, who in zip(sequences, speakers, strict=True)]
    loss = sum((logits.float() * w).sum() for logits, w in zip(wanted, loss_weights, strict=True))
    if loss.requires_grad:
        loss.backward()
    gradients, wanted_gradients = {}, {}
    for slot in TARGETS:
        for path, method in methods_of(model, slot).items():
            for name, mine, theirs in zip("ab", (method.a_RI, method.b_OR), factors[slot][path], strict=True):
                gradients[slot, path, name], wanted_gradients[slot, path, name] = mine.grad, theirs.grad
    return (logits_TV.detach(), gradients), (torch.cat(wanted).detach(), wanted_gradients)


def off(got: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest wanted value."""
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


def assert_equal(packed, alone, tolerance: float):
    assert off(packed[0], alone[0]) < tolerance
    largest = max((g.abs().max().item() for g in alone[1].values() if g is not None), default=0.0)
    for key, wanted in alone[1].items():
        got = packed[1][key]
        if wanted is None:
            assert got is None or not got.any(), f"{key}: a gradient for a slot that does not speak"
        else:
            # Relative to this factor's own gradient; or, where that one is nearly nothing, to the largest of all.
            bound = tolerance * max(wanted.abs().max().item(), 1e-2 * largest)
            assert (got - wanted).abs().max() <= bound, key


# float32: 2 layers of sums of up to 48 terms, errors of 2⁻²⁴ each growing by the weights (0.3 · √32 = 1.7 a layer).
# Seen: 3e-6 at most. A wrong mask, position, scale or slot is off by more than 1e-2.
TIGHT = 1e-4

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)
fractions = st.sampled_from([-1.0, 0.0, 0.25, 1.0, 1.7])


def sentences(lengths, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


@settings(max_examples=30)
@given(lengths=lengths, data=st.data(), seed=st.integers(0, 100))
def test_logits_and_gradients_equal_each_sequence_alone(lengths, data, seed):
    """Any lengths, any slot (or none) on any segment; the slots have no method at some layers."""
    speakers = [data.draw(st.sampled_from([{}, {"one": 1.0}, {"two": 1.0}])) for _ in lengths]
    assert_equal(*both("llama", sentences(lengths, seed), speakers), TIGHT)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_packed_equal_each_sequence_alone(family):
    """Length 1, several buckets (40 against 12 and 5), neighbours of one slot, the base between them."""
    speakers = [{"one": 1.0}, {"one": 1.0}, {}, {"two": 1.0}, {"one": 1.0}]
    assert_equal(*both(family, sentences([12, 40, 5, 1, 11]), speakers), TIGHT)


@settings(max_examples=15)
@given(lengths=lengths, short=st.integers(0, 40))
def test_long_segments_go_another_way_to_the_same_place(lengths, short):
    """Segments longer than SHORT take torch's flash kernel, alone or beside short ones."""
    speakers = [{"one": 1.0} if n % 2 else {} for n in lengths]
    with mock.patch.object(segments, "SHORT", short):
        assert_equal(*both("llama", sentences(lengths), speakers), TIGHT)


def test_really_long_segments():
    n = segments.SHORT
    speakers = [{"one": 1.0}, {"two": 1.0}, {}]
    assert_equal(*both("llama", sentences([n + 1, 3, n]), speakers), TIGHT)


@settings(max_examples=15)
@given(weights=st.lists(st.tuples(fractions, fractions), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_overlapping_spans_add_up_with_their_weights(weights, seed):
    """Both slots speak over the same segments, each with a weight of its own."""
    lengths = [5 + 3 * i for i in range(len(weights))]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    spans = [
        Span(starts[i], starts[i + 1], slot, pair[k])
        for i, pair in enumerate(weights)
        for k, slot in enumerate(TARGETS)
    ]
    speakers = [dict(zip(TARGETS, pair, strict=True)) for pair in weights]
    assert_equal(*both("llama", sentences(lengths, seed), speakers, spans), TIGHT)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_is_no_further_from_float32_than_transformers_own(family):
    """Both round at the same places, at different values: twice transformers' error, in norm, bounds chance.

    Each slot speaks over more than the segment of length 1, where the true gradient of the query is zero and ours is
    rounding of the terms that cancel (2⁻⁹ of them).
    """
    sequences, speakers = sentences([12, 40, 5, 1, 11]), [{"one": 1.0}, {"two": 1.0}, {}, {"two": 1.0}, {"one": 1.0}]
    low = copy.deepcopy(plain(family)).to(torch.bfloat16)
    rounded = copy.deepcopy(low).float()  # the same bfloat16 weights: the truth for both
    packed, alone = both(family, sequences, speakers, dtype=torch.bfloat16, oracle=low)
    _, truth = both(family, sequences, speakers, dtype=torch.bfloat16, oracle=rounded)

    def error(found):
        return (found[0].float() - truth[0].float()).norm() / truth[0].float().norm()

    assert error(packed) < 2 * error(alone)
    for slot in TARGETS:
        keys = [key for key in truth[1] if key[0] == slot]
        got, theirs, wanted = (torch.cat([found[1][key].flatten() for key in keys]) for found in (packed, alone, truth))
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 2 * (theirs - wanted).norm()  # all factors together; one alone varies more
        for key in keys:
            assert (packed[1][key] - truth[1][key]).norm() < 4 * (alone[1][key] - truth[1][key]).norm(), key


def test_the_models_own_attention_may_be_eager():
    model = adapted("llama")
    sequences = sentences([7, 9])
    model.set_attn_implementation("eager")
    try:
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in sequences])
        with running(model, pack(sequences, ["one", "one"])):
            packed = model.get_output_embeddings()(hidden_states(model))
        assert model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation("sdpa")
    assert off(packed, alone) < TIGHT


def test_nan_of_one_segment_stays_its_own():
    """A slot gone wrong in a run of many must not reach the others: neither their logits nor their gradients."""
    model = adapted("llama")
    sequences = sentences([6, 9, 7, 50])

    def run(slots):
        model.zero_grad()
        with running(model, pack(sequences, slots)):
            logits_TV = model.get_output_embeddings()(hidden_states(model))
            logits_TV.square().sum().backward()
        return logits_TV.detach(), {path: m.a_RI.grad.clone() for path, m in methods_of(model, "two").items()}

    wanted, gradients = run([None, "two", "two", None])
    broken = methods_of(model, "one")["model.layers.0.self_attn.q_proj"].b_OR
    held = broken[0, 0].item()
    broken.data[0, 0] = float("nan")
    try:
        got, got_gradients = run(["one", "two", "two", "one"])
    finally:
        broken.data[0, 0] = held
        model.zero_grad()
    assert got[:6].isnan().all() and got[22:].isnan().all()
    assert off(got[6:22], wanted[6:22]) < TIGHT
    assert all(off(got_gradients[path], g) < TIGHT for path, g in gradients.items())


def test_gradient_checkpointing_computes_the_same():
    sequences, speakers = sentences([12, 30]), [{"one": 1.0}, {"two": 1.0}]
    wanted = both("llama", sequences, speakers)[0]
    model = adapted("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        with mock.patch.object(Leaf, "forward", autospec=True, side_effect=Leaf.forward) as forward:
            got = both("llama", sequences, speakers)[0]
        assert forward.call_count == 2 * len([m for m in model.modules() if isinstance(m, Leaf)])  # forward, recompute
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert_equal(got, wanted, TIGHT)


# Ordinary calls: untouched by what was packed before.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_ordinary_padded_batches_equal_each_sequence_alone(family, side):
    model, sequences = adapted(family), sentences([9, 4, 1])
    with running(model, pack(sequences, ["two", None, "one"])):
        hidden_states(model)
    ids = torch.zeros(3, 9, dtype=torch.int64)
    mask = torch.zeros(3, 9, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(9 - len(sequence), 9)
        ids[row, where], mask[row, where] = torch.tensor(sequence), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    factors = {s: {p: (m.a_RI, m.b_OR) for p, m in methods_of(model, s).items()} for s in TARGETS}
    for slot in (None, "one", "two"):
        with speaking(model, slot), torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            for row, sequence in enumerate(sequences):
                alone = logits_alone(plain(family), sequence, {slot: 1.0} if slot else {}, factors)
                assert off(logits[row][mask[row].bool()], alone) < TIGHT


def test_labels_loss_and_cache_of_an_ordinary_call_work():
    model, (ids,) = adapted("llama"), sentences([12])
    ids = torch.tensor([ids])
    with torch.no_grad(), speaking(model, "one"):
        whole = model(input_ids=ids, labels=ids)
        first = model(input_ids=ids[:, :8], use_cache=True)
        rest = model(input_ids=ids[:, 8:], past_key_values=first.past_key_values)
    wanted = nn.functional.cross_entropy(whole.logits[0, :-1], ids[0, 1:])
    assert torch.allclose(whole.loss, wanted, rtol=1e-5)
    assert off(rest.logits, whole.logits[:, 8:]) < TIGHT


def test_the_first_slot_is_the_voice_and_speaking_is_undone():
    model, (ids,) = adapted("llama"), sentences([12])
    ids = torch.tensor([ids])
    with torch.no_grad():
        ordinary = model(input_ids=ids).logits
        with speaking(model, "one"):
            one = model(input_ids=ids).logits
            with speaking(model, None):
                base = model(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, one)
        with pytest.raises(ZeroDivisionError), speaking(model, "two"):  # noqa: PT012
            two = model(input_ids=ids).logits
            1 / 0  # noqa: B018
        assert torch.equal(model(input_ids=ids).logits, ordinary)
        untouched = plain("llama")(input_ids=ids).logits
    assert torch.equal(ordinary, one)
    assert off(one, base) > 0.01 and off(two, base) > 0.01 and off(one, two) > 0.01
    assert off(base, untouched) < TIGHT


@pytest.mark.parametrize("place", ["before", "inside", "in backward"])
def test_attention_and_stream_are_restored_after_an_exception(place):
    model = adapted("llama")
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), running(model, pack(sentences([3]), ["one"])):  # noqa: PT012
        assert model.config._attn_implementation == attention.ATTENTION
        if place == "inside":
            with mock.patch.object(Leaf, "forward", side_effect=ZeroDivisionError):
                hidden_states(model)
        hidden = hidden_states(model)
        if place == "in backward":
            hidden.register_hook(lambda g: 1 / 0)
            hidden.sum().backward()
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == before != attention.ATTENTION
    assert wiring_of(model).stream is None
    model.zero_grad()


def test_one_stream_at_a_time():
    model = adapted("llama")
    stream = pack(sentences([3]))
    with running(model, stream), pytest.raises(RuntimeError, match="already running"), running(model, stream):
        pass
    assert wiring_of(model).stream is None
    with pytest.raises(RuntimeError, match="no stream is running"):
        hidden_states(model)


def test_a_name_that_is_not_attached_is_refused():
    """Else the base would speak in the adapter's place, and its figures would be reported as the adapter's."""
    model = adapted("llama")
    with (
        pytest.raises(VeneerError, match=r"three.*one, two"),
        running(model, pack(sentences([3, 4]), ["one", "three"])),
    ):
        pass
    with pytest.raises(ModelError, match=r"three.*one, two"), speaking(model, "three"):
        pass


# Families that the packed forward cannot compute: refused by name, not silently wrong.

STATE_SPACE = MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
REFUSED = {
    "state space": (STATE_SPACE, "mamba.*second of three packed sequences"),
    "position bias": (
        AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=61),
        "bloom.*2 of its 2 layers do not compute attention through",
    ),
    "attention of its own": (
        AutoConfig.for_model("gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=61, n_positions=64),
        "gptj.*2 of its 2 layers do not compute attention through",
    ),
    "convolution in one layer": (
        config_of("lfm2", layer_types=["conv", "full_attention"]),
        "lfm2.*1 of its 2 layers do not compute attention through",
    ),
    "attention in chunks": (
        config_of("llama4_text", head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=64),
        r"llama4_text.*its attention layers do not tell of a mask of its own \(size 64\)",
    ),
    # Which rotary frequencies are used depends on the longest position of the call, so on the neighbours.
    "dynamic rotary embedding": (
        LlamaConfig(
            **{**SIZES, "max_position_embeddings": 32},
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
        "llama.*dynamic",
    ),
    "longrope": (
        LlamaConfig(
            **SIZES,
            rope_parameters={
                "rope_type": "longrope",
                "factor": 4.0,
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
            },
        ),
        "llama.*longrope",
    ),
}


def test_a_window_that_layers_do_not_tell_of_is_found_however_wide_it_is(monkeypatch):
    """Wider than what the probe runs: nothing but the mask shows it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=4096)).float().eval()
    prepare(model)
    probe(model)
    monkeypatch.setattr(attention, "Scores", lambda scale, window, *rest: Scores(scale, None, *rest))
    with pytest.raises(ModelError, match=r"mistral.*local attention over 4096"):
        probe(model)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    config, message = REFUSED[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    prepare(model)
    before = getattr(model.config, "_attn_implementation", None)
    with pytest.raises(ModelError, match=message):
        probe(model)
    assert getattr(model.config, "_attn_implementation", None) == before
    model(input_ids=torch.tensor([[1, 2, 3]]))  # ordinary calls still work
    with pytest.raises(ModelError, match="no packed path"), running(model, pack([[1, 2]])):
        pass


@pytest.mark.parametrize("case", ["position bias", "state space"])
def test_a_model_that_never_met_the_loader_is_refused_too(case):
    """`attach` on a model made by hand: the first stream must not be silently wrong."""
    config, _ = REFUSED[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    attach(model, LoraSettings(r=2))
    stream = pack(sentences([12, 20]), ["default"] * 2)
    with pytest.raises(ModelError, match="no packed path"), running(model, stream):
        hidden_states(model)
    detach(model)


# The stream itself.


@given(lengths=lengths, data=st.data())
def test_pack_says_who_speaks_on_every_row(lengths, data):
    slots = [data.draw(st.sampled_from([None, "one", "two"])) for _ in lengths]
    sequences = sentences(lengths)
    stream = pack(sequences, slots)
    assert stream.token_ids_T.tolist() == [token for ids in sequences for token in ids]
    assert stream.positions_T.tolist() == [i for n in lengths for i in range(n)]
    assert list(stream.starts) == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    rows = [None] * sum(lengths)
    for start, stop, slot, weight in stream.spans:
        assert weight == 1.0 and rows[start:stop] == [None] * (stop - start)
        rows[start:stop] = [slot] * (stop - start)
    assert rows == [slot for slot, n in zip(slots, lengths, strict=True) for _ in range(n)]
    for first, second in zip(stream.spans, stream.spans[1:], strict=False):
        assert first.slot != second.slot or first.stop != second.start  # neighbours of one slot share a span


@pytest.mark.parametrize("sequences", [[], [[]], [[1], [], [2]]])
def test_pack_refuses_empty_sequences(sequences):
    with pytest.raises(ValueError, match="at least one token"):
        pack(sequences)
