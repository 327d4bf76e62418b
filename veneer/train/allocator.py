"""Settings of the allocators: the C library's for training on the CPU, torch's on CUDA."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGE = 2**30
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed activations instead of handing them back to the system; False elsewhere.

    By default each tensor of some megabytes is mapped anew, and the kernel clears every page of it: about a tenth of a
    training step. What that costs in memory, `give_back_freed_memory` bounds.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGE) and libc.mallopt(_M_TRIM_THRESHOLD, _LARGE))


def give_back_freed_memory() -> bool:
    """Hands memory that is free but kept back to the system, from between what is in use too; False where glibc is not.

    Kept memory breaks into pieces where steps differ in size: without this a run of 63 steps held 2,584 MiB and more
    with every step, with it every 8 steps 2,390 (docs/log.md). It takes a tenth of a second, and the next step has
    pages to clear: about a fiftieth of 8 steps.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is None or not hasattr(libc, "malloc_trim"):
        return False
    libc.malloc_trim(0)
    return True


def growing_segments() -> bool:
    """Lets CUDA memory grow in place, so that freed blocks serve tensors of other sizes; False where it is not done.

    With segments of fixed sizes a run whose tensors just fit is out of memory with a tenth of it free in pieces.
    What the user's environment asks for stands.
    """
    if not torch.cuda.is_available() or not sys.platform.startswith("linux") or any(map(os.environ.get, _VARIABLES)):
        return False
    settle = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # from torch 2.9
    (settle or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
    return True
