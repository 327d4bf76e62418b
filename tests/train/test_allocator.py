"""The allocators' settings: asked for where they exist, and never over what the environment asks for."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from veneer.train.allocator import give_back_freed_memory, growing_segments


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append, raising=False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_segments_grow_on_cuda(asked: list[str]) -> None:
    assert growing_segments() and asked == ["expandable_segments:True"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_environment_asks_for_stands(asked: list[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    assert not growing_segments() and not asked


def test_nothing_is_asked_for_without_a_gpu(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not growing_segments() and not asked


# In a process of its own: what is set here stays set. Of 64 blocks of 4 MiB every second is freed, none at the end.
KEPT = """
import torch
from veneer.train.allocator import give_back_freed_memory, keep_freed_memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20
assert keep_freed_memory()
blocks = [torch.ones(2**20) for _ in range(64)]
full = resident()
blocks = blocks[1::2]
kept = resident()
assert give_back_freed_memory()
print(full - kept, kept - resident())
"""


GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    freed, given_back = map(int, done.stdout.split())
    assert freed < 32
    assert given_back > 96  # of 128 MiB


def test_there_is_nothing_to_give_back_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert not give_back_freed_memory()
