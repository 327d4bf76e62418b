"""Checkpoints of models that see as well, and of those with experts: loaded, stored otherwise, and said aloud."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.families import config_of, gemma3, llava, model_of, qwen2_vl
from tests.model.test_load import words
from veneer.adapter.attach import attach, methods_of
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.merge.into_base import merge_into_base
from veneer.model.layers import decoder_layers
from veneer.model.leaf import Leaf
from veneer.model.load import load
from veneer.model.swap import linear_paths

IDS = torch.arange(3, 23)[None]
SEEING = {"gemma3": gemma3, "llava": llava, "qwen2_vl": qwen2_vl}
MIXTRAL = partial(config_of, "mixtral", num_local_experts=4, num_experts_per_tok=2)


def saved(config, folder: Path) -> str:
    config.get_text_config().vocab_size = 96  # the tokenizer's
    torch.manual_seed(0)
    model_of(config).save_pretrained(folder)
    words().save_pretrained(folder)
    return str(folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", SEEING)
def test_families_that_see_are_loaded_whole_and_their_language_model_is_what_adapts(family, tmp_path):
    name = saved(SEEING[family](), tmp_path)
    model = load(name, "float32", progress=False).model
    paths = linear_paths(model)
    assert len(paths) == 14 and all(path.startswith("model.language_model.layers.") for path in paths)
    assert len(decoder_layers(model)) == 2
    torch.manual_seed(0)
    torch.testing.assert_close(logits(model), logits(model_of(model.config)), rtol=1e-4, atol=1e-4)  # norms are ours


@pytest.mark.parametrize("family", SEEING)
def test_families_that_see_are_quantised_where_they_read(family, tmp_path):
    """Whatever the files call these layers: as this release of transformers does, or as older ones did."""
    name = saved(SEEING[family](), tmp_path)
    dense, small = load(name, "float32", progress=False).model, load(name, "float32", storage="int8", progress=False)
    leaves = {path for path, module in small.model.named_modules() if isinstance(module, Leaf)}
    assert leaves == set(linear_paths(dense))
    # 8 bits a weight: two layers of rounding to 1/254 of the row's largest.
    assert (logits(small.model) - logits(dense)).abs().max() < 0.1 * logits(dense).abs().max()


def test_families_that_see_are_merged_into_a_model_that_sees(tmp_path):
    name = saved(gemma3(), tmp_path / "base")
    model = attach(load(name, "float32", progress=False).model, LoraSettings(r=2, target_modules=["q_proj"]))
    for method in methods_of(model, "default").values():
        torch.nn.init.normal_(method.b_OR)
    take(model).save(tmp_path / "adapter")
    report = merge_into_base(str(tmp_path / "adapter"), name, str(tmp_path / "merged"))
    assert report.layers == 2 and report.logits_difference < 1e-4 * report.logits_scale


def test_families_with_experts_say_that_these_stay_dense(tmp_path):
    name = saved(MIXTRAL(), tmp_path)
    with pytest.warns(UserWarning, match=r"as nf4: experts.down_proj, experts.gate_up_proj \(4 in a layer.*stay dense"):
        model = load(name, "float32", storage="nf4", progress=False).model
    assert sum(isinstance(module, Leaf) for module in model.modules()) == 8
