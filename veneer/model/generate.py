"""Text from base or adapter: the plain generator, the reference that faster engines are held against.

Legend: B sequences of a batch, V vocabulary.

Sampling draws from one generator per sequence, seeded by (seed, number of the sequence): a text does not depend on what
else is in its batch, except through rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from veneer.bases.kept import decoded
from veneer.errors import DataError
from veneer.model.added_tokens import added_by, has_added
from veneer.model.packed import speaking


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    slot: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[str]:
    """The continuation of every prompt (token ids), spoken by `slot` (None: the base alone), special tokens left out.

    temperature 0 takes the likeliest token. Prompts of like length share a batch; results are in the prompts' order.
    """
    _check_prompts(prompts)
    _check_known(model, prompts, slot)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with decoded(model):
        for batch in batches:
            written: list[list[int]] = [[] for _ in batch]
            for tokens in _decode(
                model, tokenizer, [prompts[i] for i in batch], batch, slot, max_new_tokens, temperature, top_p, seed
            ):
                for place, token in tokens.items():
                    written[place].append(token)
            for i, ids in zip(batch, written, strict=True):
                texts[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    slot: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The same text as `generate`, piece by piece; a piece never ends inside a character."""
    _check_prompts([prompt_ids])
    _check_known(model, [prompt_ids], slot)
    ids: list[int] = []
    said = ""
    with decoded(model):
        for tokens in _decode(model, tokenizer, [prompt_ids], [0], slot, max_new_tokens, temperature, top_p, seed):
            ids.append(tokens[0])
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("\ufffd") and len(text) > len(said):
                yield text[len(said) :]
                said = text
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if len(text) > len(said):
        yield text[len(said) :]


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    empty = [number for number, prompt in enumerate(prompts, start=1) if not len(prompt)]
    if empty:
        raise DataError(
            f"empty prompts cannot be continued: number {', '.join(map(str, empty[:5]))}; each needs at least one token"
        )


def _check_known(model: Any, prompts: Sequence[Sequence[int]], slot: str | None) -> None:
    """Where some slot has added tokens, another may be given a text in them; what it says to that would be noise."""
    if not has_added(model):
        return
    last = max([len(model.get_input_embeddings().weight) - 1, *added_by(model, slot).values()])
    strange = [number for number, prompt in enumerate(prompts, start=1) if max(prompt) > last]
    if strange:
        raise DataError(
            f"prompts with tokens that {slot or 'the base'} does not have: number {', '.join(map(str, strange[:5]))}; "
            "next: encode them by the tokenizer of who answers (veneer.model.added_tokens.tokenizer_of)"
        )


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's and those of the model's generation settings."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [tokenizer.eos_token_id, *listed] if token is not None}


@torch.no_grad()
def _decode(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    slot: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[dict[int, int]]:
    """Each step: place in the batch -> token, for the places still writing. End tokens are not yielded."""
    device, ends = next(model.parameters()).device, end_tokens(model, tokenizer)
    generators = [torch.Generator(device).manual_seed(seed * 1_000_003 + number) for number in numbers]
    ids_BL, mask_BL = _left_padded(prompts, next(iter(ends), 0), device)
    cache, places = DynamicCache(config=model.config), list(range(len(prompts)))
    for _ in range(max_new_tokens):
        positions = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -ids_BL.shape[1] :]
        with speaking(model, slot):  # only around the call: between steps the caller may let others speak
            out = model(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        tokens = _choose(out.logits[:, -1].float(), temperature, top_p, generators)
        alive = [i for i, token in enumerate(tokens) if token not in ends]
        if not alive:
            return
        yield {places[i]: tokens[i] for i in alive}
        if len(alive) < len(places):  # rows that have ended leave the batch
            keep = torch.tensor(alive, device=device)
            cache.batch_select_indices(keep)
            mask_BL, places = mask_BL[keep], [places[i] for i in alive]
            generators, tokens = [generators[i] for i in alive], [tokens[i] for i in alive]
        ids_BL = torch.tensor(tokens, device=device)[:, None]
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(places), 1)], 1)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _choose(logits_BV: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]) -> list[int]:
    if temperature == 0.0:
        return logits_BV.argmax(-1).tolist()
    probs_BV = torch.softmax(logits_BV / temperature, -1)
    if top_p < 1.0:
        probs_BV = _nucleus(probs_BV, top_p)
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(probs_BV, generators, strict=True)]


def _nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """Keeps the likeliest tokens whose probabilities reach top_p, at least one (Holtzman et al., arXiv 1904.09751)."""
    sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
    kept = sorted_BV.cumsum(-1) - sorted_BV < top_p
    return torch.zeros_like(probs_BV).scatter_(1, order_BV, sorted_BV * kept)
