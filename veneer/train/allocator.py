"""The C allocator's settings for training on the CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGE = 2**30


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed activations instead of handing them back to the system; False elsewhere.

    By default each tensor of some megabytes is mapped anew, and the kernel clears every page of it: about a tenth of a
    training step. Peak memory stays what it was, because every step frees and asks for the same sizes.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGE) and libc.mallopt(_M_TRIM_THRESHOLD, _LARGE))
