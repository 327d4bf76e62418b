"""Likelihoods of sequences against the logits of the model's own forward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from veneer.adapter.attach import attach
from veneer.config import LoraSettings
from veneer.model.likelihood import sequence_likelihoods
from veneer.model.losses import sequence_nll
from veneer.model.packed import speaking

PROMPT = list(range(3, 33))  # long enough to be shared
EXAMPLES = [
    SimpleNamespace(input_ids=[*PROMPT, *end], targets=[False] * len(PROMPT) + [True] * len(end))
    for end in ([40, 41], [50], [60, 61, 62, 63])
] + [SimpleNamespace(input_ids=[5, 9, 2], targets=[True, True, True])]


@pytest.mark.parametrize("slot", [None, "default"])
@pytest.mark.parametrize("most", [10, 4096])
def test_likelihoods_are_those_of_the_models_own_logits(pico, slot, most):
    attach(pico, LoraSettings(r=2))
    with torch.no_grad():
        for name, parameter in pico.named_parameters():
            if "default" in name.split("."):
                parameter.normal_(0, 0.3)
    # What the model would say, so that some targets are hits.
    with torch.no_grad(), speaking(pico, slot):
        said = pico(torch.tensor([PROMPT])).logits[0, -1].argmax().item()
    examples = [*EXAMPLES, SimpleNamespace(input_ids=[*PROMPT, said], targets=[False] * len(PROMPT) + [True])]
    found = sequence_likelihoods(pico, examples, slot, max_tokens=most)
    for got, example in zip(found, examples, strict=True):
        ids, targets = torch.tensor([example.input_ids]), torch.tensor(example.targets[1:])
        with torch.no_grad(), speaking(pico, slot):
            logits = pico(ids).logits[0, :-1]
        nll = F.cross_entropy(logits, ids[0, 1:], reduction="none")[targets].sum().item()
        assert got.nll == pytest.approx(nll, rel=1e-4)
        assert got.tokens == targets.sum().item()
        assert got.hits == (logits.argmax(-1) == ids[0, 1:])[targets].sum().item()
    assert found[-1].hits == found[-1].tokens == 1
    pairs = [(one.nll, one.tokens) for one in found]
    assert pairs == [pytest.approx(pair) for pair in sequence_nll(pico, examples, slot)]
