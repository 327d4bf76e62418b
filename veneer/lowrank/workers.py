"""Layers in parallel, a thread of arithmetic each.

At the shapes of low-rank updates torch's own threads gain little, and where another process holds a core they cost tens
of times the work: each product waits for its slowest thread. So the bytes do not depend on the number of cores, either.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers(most: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, `most` at most. They, and the caller until the block ends, compute with one each.

    What has not begun when the block ends is dropped.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, most or threads), initializer=lambda: torch.set_num_threads(1))
    torch.set_num_threads(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what one thread sets, MKL takes for all
