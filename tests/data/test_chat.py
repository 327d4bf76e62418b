"""Token ids and masks: what is trained is exactly the replies with their end token, as generation would make them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.chat import Conversation, Template, conversation, encode_rows
from veneer.data.files import read_rows
from veneer.errors import DataError

FREE_TEXT = st.text(st.sampled_from("ab 1\n\té中🙂.\r\u2028"), max_size=12)
TEXT = FREE_TEXT.map(str.strip).filter(bool)
LONG = 10_000


def chats(text=TEXT):
    """Conversations: perhaps a system message, then pairs of user and assistant, in either layout."""
    pairs = st.lists(st.tuples(text, text.filter(str.strip)), min_size=1, max_size=3)
    return st.builds(_chat, st.none() | text, pairs, st.sampled_from(["messages", "prompt_completion"]))


def _chat(system, pairs, layout):
    spoken = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in pairs:
        spoken += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(tuple(spoken), (pairs[-1][1],), layout)


def trained_runs(example, tokenizer):
    """The trained stretches of an example, decoded."""
    runs, before = [], False
    for token, trained in zip(example.input_ids, example.targets, strict=True):
        if trained:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run) for run in runs]


def whole_ids(conv, tokenizer):
    rendered = tokenizer.apply_chat_template(list(conv.messages), tokenize=False)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def check_example(conv, tokenizer):
    """The three laws: ids are the tokenised whole (without its last white space), the mask is the replies, the
    prompt is a prefix that ends where the last reply begins."""
    template = Template(tokenizer)
    example = template.encode(conv, 0, LONG)
    whole = whole_ids(conv, tokenizer)
    assert list(example.input_ids) == whole[: len(example.input_ids)]
    assert not tokenizer.decode(whole[len(example.input_ids) :]).strip()
    replies = [conv.messages[turn]["content"] + "<|im_end|>" for turn in conv.trained_turns()]
    assert trained_runs(example, tokenizer) == replies
    prompt = template.prompt_ids(conv)
    assert prompt == list(example.input_ids[: len(prompt)])
    assert example.targets[len(prompt) - 1 :] == (False, *[True] * (len(example.input_ids) - len(prompt)))


@given(conv=chats())
@pytest.mark.parametrize("name", ["chatml", "trimming"])
def test_ids_mask_and_prompt(tokenizer_of, name, conv):
    check_example(conv, tokenizer_of(name))


@given(conv=chats(FREE_TEXT))
def test_white_space_is_trained_as_it_stands_or_refused(tokenizer_of, conv):
    tokenizer = tokenizer_of("chatml")
    faults: dict[int, str] = {}
    if Template(tokenizer).encode_all({0: conv}, LONG, faults):
        check_example(conv, tokenizer)
    else:
        assert "the chat template of small-test-tokenizer puts" in faults[0]
        assert any(message["content"] != message["content"].strip() for message in conv.messages)


def test_a_reply_that_merges_with_the_template_is_refused(chatml):
    conv = conversation({"prompt": "a", "completion": "\n\nb"}, "row")
    with pytest.raises(DataError, match="row 1: the chat template of small-test-tokenizer puts 'sistant"):
        Template(chatml).encode(conv, 0, LONG)


def test_so_does_it_with_the_real_tokenizer(smollm2_tokenizer):
    conv = conversation({"prompt": "a", "completion": "\n\nb"}, "row")
    with pytest.raises(
        DataError, match=r"row 4: the chat template of .* puts 'sistant\\n' and '\\n\\nb<\|im_' side by"
    ):
        Template(smollm2_tokenizer).encode(conv, 3, LONG)


@given(conv=chats(), max_length=st.integers(1, 120))
def test_truncation_is_on_the_right_and_counted(tokenizer_of, conv, max_length):
    template = Template(tokenizer_of("chatml"))
    whole = template.encode(conv, 0, LONG)
    if not any(whole.targets[:max_length]):
        with pytest.raises(DataError, match=f"max_length is {max_length}"):
            template.encode(conv, 0, max_length)
        return
    cut = template.encode(conv, 0, max_length)
    assert cut.input_ids == whole.input_ids[:max_length]
    assert cut.targets == whole.targets[:max_length]
    assert cut.dropped == len(whole.input_ids) - len(cut.input_ids)


def test_chatml_by_hand(smollm2_tokenizer):
    example = Template(smollm2_tokenizer, system_prompt="").encode(
        conversation({"prompt": "hi", "completion": "yo"}, "row"), 5, LONG
    )
    pieces = [
        "<|im_start|>",
        "system",
        "\n",
        "<|im_end|>",
        "\n",
        "<|im_start|>",
        "user",
        "\n",
        "hi",
        "<|im_end|>",
        "\n",
    ]
    pieces += ["<|im_start|>", "ass", "istant", "\n", "yo", "<|im_end|>"]
    assert [smollm2_tokenizer.decode([token]) for token in example.input_ids] == pieces
    assert example.targets == (*[False] * 15, True, True)
    assert example.row == 5
    assert example.dropped == 0


def test_system_prompt_fills_in_and_the_rows_own_wins(chatml):
    template = Template(chatml, system_prompt="be brief")
    bare = template.prompt_ids(conversation({"prompt": "a", "completion": "b"}, "row"))
    own = [{"role": "system", "content": "be long"}, {"role": "user", "content": "a"}]
    kept = template.prompt_ids(conversation({"prompt": own, "completion": "b"}, "row"))
    assert chatml.decode(bare).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user")
    assert chatml.decode(kept).startswith("<|im_start|>system\nbe long<|im_end|>\n<|im_start|>user")


def test_prompt_of_a_conversation_that_waits_for_a_reply(chatml):
    asked = Conversation(({"role": "user", "content": "a"},), ("",), "messages")
    answered = conversation({"prompt": "a", "completion": "b"}, "row")
    assert Template(chatml).prompt_ids(asked) == Template(chatml).prompt_ids(answered)


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(tokenizer_of):
    template = Template(tokenizer_of("rewriting"))
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match="chat template of small-test-tokenizer writes a turn differently"):
        template.encode(conversation({"messages": turns}, "row"), 0, LONG)
    single = template.encode(conversation({"prompt": "a", "completion": "b"}, "row"), 0, LONG)
    assert trained_runs(single, template.tokenizer) == ["(thought)b<|im_end|>"]


def test_what_the_template_itself_refuses_is_told_row_by_row(tokenizer_of):
    template = Template(tokenizer_of("alternating"))
    bad = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    }
    with pytest.raises(DataError) as caught:
        encode_rows([bad, {"prompt": "a", "completion": "b"}, bad], template, LONG, "rows.jsonl")
    assert "2 of 3 rows" in str(caught.value)
    assert "rows 1, 3: the chat template of small-test-tokenizer refuses it: roles must alternate" in str(caught.value)


@pytest.mark.parametrize(("starts", "opening"), [(False, ""), (True, "<s>")])
def test_without_a_template_the_plain_layout_is_said_aloud(tokenizer, starts, opening):
    small = tokenizer("none", starts=starts)
    encoded = encode_rows([{"prompt": "a", "completion": "b"}], Template(small), LONG, "rows.jsonl")
    assert small.decode(encoded.examples[0].input_ids) == f"{opening}a\nb<|im_end|>"
    assert trained_runs(encoded.examples[0], small) == ["b<|im_end|>"]
    assert "small-test-tokenizer has no chat template" in encoded.notes[0]


def test_neither_template_nor_end_token_is_refused(tokenizer):
    with pytest.raises(DataError, match="neither a chat template nor an end token"):
        Template(tokenizer("none", eos_token=None))


def test_a_turn_without_an_end_token_is_said_aloud(tokenizer_of):
    encoded = encode_rows([{"prompt": "a", "completion": "b"}], Template(tokenizer_of("endless")), LONG, "rows.jsonl")
    assert trained_runs(encoded.examples[0], tokenizer_of("endless")) == [" b\n"]
    assert any("does not learn where to stop" in note for note in encoded.notes)


@given(convs=st.lists(chats(), min_size=1, max_size=5))
def test_many_rows_are_the_rows_alone(tokenizer_of, convs):
    template = Template(tokenizer_of("chatml"))
    faults: dict[int, str] = {}
    together = template.encode_all(dict(enumerate(convs)), LONG, faults)
    assert together == [template.encode(conv, row, LONG) for row, conv in enumerate(convs)]
    assert not faults


GOOD = {"prompt": "a", "completion": "b"}


def test_every_row_without_supervision_is_counted_and_five_are_named(chatml):
    rows = [
        GOOD,
        *[{"prompt": "a", "completion": ""}] * 4,
        {"prompt": "a" * 500, "completion": "b"},
        *[{"text": "c"}] * 3,
    ]
    with pytest.raises(DataError) as caught:
        encode_rows(rows, Template(chatml), 100, "rows.jsonl")
    message = str(caught.value)
    assert message.startswith("rows.jsonl: 8 of 9 rows cannot be trained on:")
    assert "rows 2, 3, 4, 5: `completion` is empty" in message
    assert "row 6: " in message and "tokens come before the reply, max_length is 100" in message
    assert "rows 7, 8, 9: has the fields 'text'" in message
    assert "--columns" in message


def test_alike_faults_are_one_line_and_different_ones_are_cut(chatml):
    rows = [{"question": "a"}] * 8 + [{"prompt": "a", f"reply{n}": "b"} for n in range(7)]
    with pytest.raises(DataError) as caught:
        encode_rows(rows, Template(chatml), 100, "rows.jsonl")
    assert "  - rows 1, 2, 3, 4, 5 and 3 more: has the fields 'question'\n" in str(caught.value)
    assert (
        "row 12: " in str(caught.value) and "row 13: " not in str(caught.value) and "and 3 more\n" in str(caught.value)
    )


def test_an_empty_cell_is_not_answered_with_names_of_columns(chatml):
    with pytest.raises(DataError, match="mend these rows") as caught:
        encode_rows([GOOD, {"prompt": "a", "completion": ""}], Template(chatml), 100, "rows.jsonl")
    assert "--columns" not in str(caught.value)


def test_a_turn_without_its_text_names_what_it_has(chatml):
    with pytest.raises(DataError, match=r"row 1: `messages\[1\]` has only `from`, wanted an object with `role`"):
        encode_rows([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]}], Template(chatml), 100, "r")


def test_not_strict_leaves_rows_out_and_lists_them(chatml):
    rows = [{"prompt": "a", "completion": ""}, GOOD, {"prompt": "a" * 500, "completion": "b"}]
    encoded = encode_rows(rows, Template(chatml), 100, "rows.jsonl", strict=False)
    assert [example.row for example in encoded.examples] == [1]
    assert encoded.rows_without_targets == (0, 2)
    assert "2 of 3 rows cannot be trained on" in encoded.notes[-1]


@pytest.mark.parametrize(("rows", "said"), [([], "has no rows"), ([{"a": 1}], "1 of 1 rows")])
def test_nothing_left_is_an_error_even_when_not_strict(chatml, rows, said):
    with pytest.raises(DataError, match=said):
        encode_rows(rows, Template(chatml), 100, "rows.jsonl", strict=False)


def test_instruction_and_truncation_are_said_aloud(chatml):
    rows = [GOOD, {"instruction": "Do.", "prompt": "a", "completion": "b" * 100}]
    encoded = encode_rows(rows, Template(chatml), 60, "rows.jsonl")
    assert encoded.dropped_tokens == encoded.examples[1].dropped > 0
    assert r"`instruction` stands before the prompt in 1 rows, as {instruction}\n\n{prompt}" in encoded.notes[0]
    assert encoded.notes[1] == f"1 row is cut at max_length 60: {encoded.dropped_tokens} tokens are left out"
    assert encode_rows([GOOD], Template(chatml), 60, "rows.jsonl").notes == ()


@pytest.mark.parametrize(
    "name", ["multitask/number_to_words/train.jsonl", "e2e_nlg/dev.jsonl", "instruct/alpaca_test.jsonl"]
)
def test_real_rows_with_the_real_tokenizer(shared_data, smollm2_tokenizer, name):
    rows = read_rows(Path(shared_data) / name)[:200]
    encoded = encode_rows(rows, Template(smollm2_tokenizer), LONG, name)
    for row, example in list(zip(rows, encoded.examples, strict=True))[::10]:
        conv = conversation(row, name)
        assert encoded.examples[example.row] == Template(smollm2_tokenizer).encode(conv, example.row, LONG)
        check_example(conv, smollm2_tokenizer)


def test_real_conversations_of_several_turns(smollm2_tokenizer):
    turns = [{"role": role, "content": f"{role} says 12 things, ünïcode 🙂"} for role in ("user", "assistant") * 3]
    check_example(conversation({"messages": turns}, "row"), smollm2_tokenizer)


@given(conv=chats())
def test_generation_marks_change_nothing_and_say_the_same(tokenizer_of, conv):
    plain, marked = Template(tokenizer_of("chatml")), Template(tokenizer_of("marked"))
    found = marked.encode(conv, 0, LONG)
    assert found == plain.encode(conv, 0, LONG)
    if conv.layout == "messages":
        whole = marked.tokenizer.apply_chat_template(
            list(conv.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert [bool(flag) for flag in whole["assistant_masks"][: len(found.targets)]] == list(found.targets)


@given(conv=chats(), marks=st.lists(st.booleans(), min_size=3, max_size=3), by=st.sampled_from(["train", "weight"]))
def test_marked_turns_are_seen_and_not_trained(chatml, conv, marks, by):
    turns = [dict(message) for message in conv.messages]
    for turn, learnt in zip([t for t in turns if t["role"] == "assistant"], marks, strict=False):
        turn[by] = learnt if by == "train" else int(learnt)
    learnt = [turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant" and turn[by]]
    if not learnt:
        with pytest.raises(DataError, match="trains no assistant's turn"):
            conversation({"messages": turns}, "row")
        return
    example = Template(chatml).encode(conversation({"messages": turns}, "row"), 0, LONG)
    whole = Template(chatml).encode(conversation({"messages": list(conv.messages)}, "row"), 0, LONG)
    assert trained_runs(example, chatml) == learnt
    assert example.input_ids == whole.input_ids[: len(example.input_ids)]


REAL_TEMPLATES = ("qwen2_5", "qwen2_5_training", "qwen3_training", "qwen3_instruct_2507", "lfm2_2_5", "gemma4_v2")


@pytest.mark.parametrize("name", REAL_TEMPLATES)
def test_real_templates_with_tools_and_marks(tokenizer, name):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    if not (folder / f"{name}.jinja").exists():
        pytest.skip(f"this version of trl has no {name}.jinja")
    one = tokenizer("none")
    one.chat_template = (folder / f"{name}.jinja").read_text()
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    turns += [{"role": "tool", "name": "add", "content": "3"}, {"role": "assistant", "content": "three"}]
    example = encode_rows([{"messages": turns, "tools": [{"name": "add"}]}], Template(one), LONG, "rows").examples[0]
    first, second = trained_runs(example, one)
    assert "add" in first and "three" not in first
    assert "three" in second and "3" not in second
