"""How alike two models speak on sample prompts: the adapter beside its base, and what was made of both.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.data.chat import Template, conversation
from veneer.errors import DataError

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short letter to a friend who has moved to another town.",
    "A shop sells pens at 3 for 2 euros. How much are 12 pens?",
    'Return JSON with the keys "name" and "age" for: Mary is 31.',
    "def fibonacci(n):",
    "Explain in two sentences why the sky is blue.",
)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Over all positions of the prompts: mean and largest KL(first ‖ second) in nats, and the share of positions at
    which both find the same token likeliest."""

    kl: float
    worst_kl: float
    same_choice: float
    positions: int


def sample_prompts(tokenizer: Any, system_prompt: str | None = None) -> list[Tensor]:
    """Token ids (1, T) of `PROMPTS`, each as a user's turn that waits for its reply; as plain text where the chat
    template cannot say that."""
    try:
        template = Template(tokenizer, system_prompt)
        rows = [conversation({"prompt": prompt, "completion": "."}, "a sample prompt") for prompt in PROMPTS]
        return [torch.tensor([template.prompt_ids(row)]) for row in rows]
    except DataError:
        return [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]


def agreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> Agreement:
    """Of the logits (T, V) of each prompt."""
    pairs = list(zip(first, second, strict=True))
    kl_T = torch.cat([_kl(one, other) for one, other in pairs])
    same_T = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs])
    return Agreement(kl_T.mean().item(), kl_T.max().item(), same_T.double().mean().item(), len(kl_T))


def _kl(first_TV: Tensor, second_TV: Tensor) -> Tensor:
    """KL divergence at each position (T); a token that both exclude (-inf) is left out."""
    one, other = F.log_softmax(first_TV.double(), -1), F.log_softmax(second_TV.double(), -1)
    return torch.where(one > -torch.inf, one.exp() * (one - other), 0.0).sum(-1).clamp_min(0.0)
