"""Adapters of embeddings, merged: what they are is told again, so that the result loads where its parents do."""

from __future__ import annotations

import torch

from tests.families import config_of, model_of
from veneer.adapter.attach import attach, detach, methods_of
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.merge.apply import combine
from veneer.merge.recipe import Recipe
from veneer.model.load import prepare


def test_merged_embeddings_load_and_add_up(tmp_path):
    torch.manual_seed(0)
    model = model_of(config_of("llama", tie_word_embeddings=False))
    prepare(model)
    parents, ids = [], torch.tensor([[3, 9, 40, 7]])
    for seed in (0, 1):
        attach(model, LoraSettings(r=2, target_modules="embed_tokens,q_proj"), "one", seed=seed)
        for method in methods_of(model, "one").values():
            method.b_OR.data.normal_(std=0.1)
        parents.append(take(model, "one"))
        detach(model)
    combine(parents, Recipe("linear", (0.5, 1.0)))[0].save(tmp_path / "merged")
    with torch.no_grad():
        got = attach(model, Adapter.load(tmp_path / "merged"))(input_ids=ids).logits
        detach(model)
        for weight, parent in zip((0.5, 1.0), parents, strict=True):
            for module in parent.modules():
                a_RI, b_OR = parent.factors(module)
                update = weight * b_OR @ a_RI
                weight_OI = model.get_submodule(module).weight
                weight_OI += update.mT if "embed" in module else update
        torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=0, atol=1e-4)
