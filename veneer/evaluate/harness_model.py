"""A slot of a model as lm-evaluation-harness wants a model: log-likelihoods and greedy text. Imports lm_eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from veneer.errors import ConfigError, DataError
from veneer.model.added_tokens import tokenizer_of
from veneer.model.generate import end_tokens, generate
from veneer.model.likelihood import sequence_likelihoods

TOKENS = 256  # the longest answer, where a task does not say
GREEDY = {"temperature": (0, 0.0, None), "num_beams": (1,), "do_sample": (False,)}
# Settings of a generation that change nothing while it is greedy.
IDLE = ("top_p", "top_k", "min_p", "use_cache")


class Tokens(NamedTuple):
    """A text to score: which of its tokens are targets."""

    input_ids: list[int]
    targets: list[bool]


class HarnessModel(TemplateLM):
    """Answers the requests of lm_eval with `slot` of a loaded model (None: the base), through the packed forward."""

    def __init__(self, loaded: Any, slot: str | None, batch_size: int = 16) -> None:
        super().__init__()
        self.model, self.tokenizer, self.slot, self.batch_size = (
            loaded.model,
            tokenizer_of(loaded, slot),
            slot,
            batch_size,
        )
        self.max_length = getattr(loaded.model.config, "max_position_embeddings", None) or 2048

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.tokenizer.eos_token_id
        return found if found is not None else min(end_tokens(self.model, self.tokenizer))

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        found = self.tokenizer.bos_token_id
        return found if found is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids with the tokenizer's own start token, where it has one and the text does not open with it."""
        if add_special_tokens is None:
            start = self.tokenizer.bos_token
            add_special_tokens = not (start and string.startswith(start))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without `add_generation_prompt`, its last turn stays open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether it is what greedy decoding would write, of token ids."""
        texts = [self._scored(context, continuation) for _, context, continuation in requests]
        # Sorted, so that questions and examples that several texts begin with stand side by side, and are shared.
        order = sorted(range(len(texts)), key=lambda i: texts[i].input_ids)
        found = sequence_likelihoods(self.model, [texts[i] for i in order], self.slot)
        by_place = dict(zip(order, found, strict=True))
        return [(-by_place[i].nll, by_place[i].hits == by_place[i].tokens) for i in range(len(texts))]

    def _scored(self, context: Sequence[int], continuation: Sequence[int]) -> Tokens:
        if not continuation or len(continuation) > self.max_length:
            raise DataError(
                f"lm_eval asks for a continuation of {len(continuation):,} tokens; wanted 1 to {self.max_length:,}, "
                "which is what the model can see"
            )
        ids = [*context, *continuation][-(self.max_length + 1) :]
        return Tokens(ids, [place >= len(ids) - len(continuation) for place in range(len(ids))])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the model's length that score every token once."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to the first of a request's stops, those of like length together."""
        asked = [(context, _stops(options), _longest(options)) for context, options in (r.args for r in requests)]
        texts = [""] * len(asked)
        for longest in sorted({most for *_, most in asked}):
            places = [i for i, (*_, most) in enumerate(asked) if most == longest]
            if (room := self.max_length - longest) < 1:
                raise DataError(f"lm_eval asks for {longest:,} tokens; the model can see {self.max_length:,} in all")
            prompts = [self.tok_encode(asked[i][0])[-room:] for i in places]
            written = generate(
                self.model, self.tokenizer, prompts, self.slot, longest, temperature=0.0, batch_size=self.batch_size
            )
            for i, text in zip(places, written, strict=True):
                texts[i] = _cut(text, asked[i][1])
        return texts


def _stops(options: Mapping[str, Any]) -> list[str]:
    """Where text ends. ConfigError for what is not greedy decoding."""
    for name, allowed in GREEDY.items():
        # With do_sample false, as most tasks have it, a temperature has no effect.
        if name == "temperature" and not options.get("do_sample", options.get(name)):
            continue
        if name in options and options[name] not in allowed:
            raise ConfigError(f"the task asks for {name}={options[name]!r}; veneer answers lm_eval greedily")
    unknown = set(options) - {*GREEDY, *IDLE, "until", "max_gen_toks", "max_new_tokens", "max_tokens"}
    if unknown:
        raise ConfigError(f"the task asks for generation with {', '.join(sorted(unknown))}, which is not supported")
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _longest(options: Mapping[str, Any]) -> int:
    given = (options.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
    return int(next((value for value in given if value), TOKENS))


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
