"""Loading quantised onto a GPU: the values, and that neither the host nor the GPU ever holds the dense model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.model.test_load import words
from veneer.adapter.attach import attach
from veneer.bases import BASES
from veneer.bases.fp8 import fp8_supported
from veneer.config import LoraSettings
from veneer.model.leaf import Leaf
from veneer.model.load import load
from veneer.model.packed import hidden_states, running
from veneer.model.stream import pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]

# 0.8 G parameters in linear layers of at most 23 MB in bfloat16, 1.6 GB in all.
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "vocab_size": 96}
LOAD = """
import json, sys, torch
from veneer.model.load import load
torch.zeros(1, device="cuda"); torch.cuda.reset_peak_memory_stats()
def host():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("RssAnon"))
import threading, time
seen, done = [host()], threading.Event()
def watch():
    while not done.is_set():
        seen.append(host()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
model, _ = load(sys.argv[1], "bfloat16", "cuda", check=False, storage=sys.argv[2], progress=False)
done.set(); thread.join()
held = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
facts = {"held": held, "peak": torch.cuda.max_memory_allocated(), "host": max(seen) - seen[0]}
print(json.dumps(facts | {"on_cpu": sum(t.device.type == "cpu" for t in model.state_dict().values())}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, in shards of 300 MB."""
    to = tmp_path_factory.mktemp("large") / "model"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=16)).bfloat16()
    model.save_pretrained(to, max_shard_size="300MB")
    words().save_pretrained(to)
    return to


@pytest.mark.parametrize("storage", ["nf4", "nf4-dq", "int8"])
def test_the_dense_model_never_exists(folder: Path, storage: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), storage], capture_output=True, text=True, check=True, timeout=300
    )
    facts: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    print(storage, facts)
    dense = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert facts["on_cpu"] == 0 and facts["held"] < 0.6 * dense
    # On the GPU the quantised model, and the work space of one tensor: 23 MB in bfloat16, some copies in float32.
    assert facts["peak"] < facts["held"] + 300e6
    assert facts["host"] < 0.4 * dense  # the libraries that load on first use, and one tensor at a time


@pytest.mark.parametrize("storage", [storage for storage in BASES if storage != "dense"])
def test_it_computes_as_the_same_storage_on_the_cpu(storage: str, tmp_path: Path) -> None:
    if storage == "fp8" and not fp8_supported("cuda"):
        pytest.skip("this GPU does not multiply e4m3")
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 96}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.1)).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    loaded = load(str(tmp_path), "bfloat16", "cuda", storage=storage)  # the probe compares packed with alone
    leaves = [module for module in loaded.model.modules() if isinstance(module, Leaf)]
    assert len(leaves) == 14 and {leaf.base.storage for leaf in leaves} == {storage}
    dense = load(str(tmp_path), "float32", "cuda" if storage == "fp8" else "cpu")
    stored = {path: leaf.base.dense().cpu() for path, leaf in loaded.model.named_modules() if isinstance(leaf, Leaf)}
    for path, w_OI in stored.items():
        wanted = dense.model.get_submodule(path).weight.cpu()
        assert torch.linalg.norm(w_OI - wanted) < 0.15 * torch.linalg.norm(wanted)  # int4: 0.11 on Gaussian weights
    attach(loaded.model, LoraSettings(r=4))
    with running(loaded.model, pack([[3, 4, 5, 6], [7, 8]], slots=["default"] * 2, device="cuda")):
        hidden_states(loaded.model).float().square().sum().backward()
    gradients = [p.grad for name, p in loaded.model.named_parameters() if name.endswith("b_OR")]
    assert len(gradients) == 14 and all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
