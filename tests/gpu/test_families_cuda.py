"""Training on a CUDA GPU, a case per family and kind of target: the loop as a run arranges it there (compiled, recorded
where it may be, rows of unequal lengths) against the same loop in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.families import config_of, gemma3, gpt2
from tests.families import model_of as random_model
from veneer.adapter.attach import attach, methods_of
from veneer.config import LoraSettings, TrainSettings
from veneer.data.chat import Example
from veneer.model.load import prepare
from veneer.train.fit import fit
from veneer.train.job import Job
from veneer.train.loop import loop
from veneer.train.ranks import ALONE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]

LINEAR: dict[str, Any] = {"target_modules": "all-linear"}
EXPERTS: dict[str, Any] = {"target_modules": "q_proj,gate_up_proj,down_proj"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
GEMMA2 = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
GPT_OSS = {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
NO_YARN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
LLAMA = partial(config_of, "llama")
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (LLAMA, LINEAR),
    "llama, dora": (LLAMA, LINEAR | {"method": "dora"}),
    "llama, embedding and head": (LLAMA, {"target_modules": "q_proj,embed_tokens,lm_head"}),
    "llama, rows of tokens": (LLAMA, {"target_modules": "q_proj", "trainable_token_indices": [5, 9]}),
    "qwen2": (partial(config_of, "qwen2"), LINEAR),
    "qwen3": (partial(config_of, "qwen3", head_dim=8), LINEAR),
    "mistral": (partial(config_of, "mistral", head_dim=8, sliding_window=8), LINEAR),
    "gemma2": (partial(config_of, "gemma2", **GEMMA2), LINEAR),
    "gemma3": (gemma3, LINEAR),
    "phi3": (partial(config_of, "phi3"), LINEAR),
    "olmo2": (partial(config_of, "olmo2"), LINEAR),
    "gpt2": (gpt2, {"target_modules": "c_attn,mlp.c_proj"}),
    "qwen3_moe": (partial(config_of, "qwen3_moe", **MOE), EXPERTS),
    "mixtral": (partial(config_of, "mixtral", num_local_experts=4, num_experts_per_tok=2), EXPERTS),
    "gpt_oss": (partial(config_of, "gpt_oss", **GPT_OSS, **NO_YARN), EXPERTS),
}
# Losses near 5. In bfloat16 one differs by the rounding (2^-8) of a dozen products, more with every step; seen: 7e-2.
CLOSE = {torch.float32: 2e-3, torch.bfloat16: 1e-1}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_run_on_the_gpu_is_the_run_on_the_cpu(case: str, dtype: torch.dtype) -> None:
    config, targets = CASES[case]
    wanted = losses(config(), targets, "cpu", torch.float32)
    found = losses(config(), targets, "cuda", dtype)
    assert wanted[-1] < wanted[0] - 0.05  # it learns: equal losses say something
    torch.testing.assert_close(found, wanted, rtol=0, atol=CLOSE[dtype])


def losses(config: Any, targets: dict[str, Any], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Of eight steps over one batch of unequal rows, in the parts that a run is made of."""
    torch.manual_seed(0)
    model = random_model(config).to(device, dtype)
    prepare(model)
    attach(model, LoraSettings(r=4, lora_alpha=8, **targets), "default", seed=0)
    rows = [row(n, length) for n, length in enumerate((24, 9, 17, 30))]
    settings = TrainSettings(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0)
    job = Job("default", settings, rows, (), 1e-2, methods_of(model, "default"))
    graphs, _ = fit(model, job, settings, ALONE)
    told: list[float] = []
    loop(model, [job], record=lambda job, facts: told.append(facts["loss"]), save=lambda _: None, graphs=graphs)
    return torch.tensor(told)


def row(n: int, length: int) -> Example:
    ids = torch.randint(3, 57, (length,), generator=torch.Generator().manual_seed(n)).tolist()
    return Example(tuple(ids), (True,) * length, n, 0)
