"""The processes that train one adapter together, one a GPU, as torchrun starts them; and what they tell each other.

Adapters are small, so every process holds them whole and takes the same optimiser steps; rows are shared out, and
gradients and losses are summed. `Ranks()` is a process alone: it shares with nobody and sums nothing. A rank here is
a process's number, not the width of an adapter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from veneer.errors import ConfigError, TrainingError, VeneerError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # one process may load from a slower disk than another
HEARD = timedelta(seconds=5)  # for the first process to learn of a failure and tell it


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's part of the rows: every one of them is in exactly one process's."""
        return rows[self.rank :: self.world]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, now holding the sum over all processes, the same bits in each."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Inside, the processes that torchrun started are connected: nccl and a GPU each, or gloo on the CPU.

    Where another caller has connected them already, that connection is used and left alone; without torchrun this is
    one process. An error of one process ends all of them: the others raise TrainingError with its message.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    _take_gpu()
    store, rank, world = next(dist.rendezvous("env://"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    ranks = Ranks(rank, world)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
        ranks.barrier()  # so that none has failed and gone while another is still connecting
        yield ranks
    except Exception as error:
        ended = _ended(store, ranks, error)
        if ended is error:
            raise
        raise ended from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _take_gpu() -> None:
    """Makes the GPU of this process's number on its machine the one that "cuda" means."""
    if not torch.cuda.is_available():
        return
    number, gpus = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))), torch.cuda.device_count()
    if number >= gpus:
        raise ConfigError(
            f"process {number} of this machine has no GPU, torch sees {gpus}; next: torchrun --nproc-per-node {gpus}"
        )
    torch.cuda.set_device(number)


def _ended(store: dist.Store, ranks: Ranks, error: Exception) -> Exception:
    """What to raise here after `error`: itself, or the failure of the process that took this one along."""
    told = _told(store, ranks)
    if told and not isinstance(error, VeneerError):
        ended: Exception = TrainingError(told)
    elif "gloo/transport" in str(error) or isinstance(error, dist.DistError):
        ended = TrainingError(
            f"a process of this run ended without a word, perhaps killed for its memory ({str(error)[:200]}). "
            "The last checkpoint stands: --resume goes on from it"
        )
    else:
        ended = error
    with contextlib.suppress(RuntimeError):  # the process that keeps the store may be the one that has gone
        _tell(store, ranks, ended)
    _leave()
    if not ranks.is_main and isinstance(ended, VeneerError):
        ended.told_elsewhere = _heard(store)
    return ended


def _tell(store: dist.Store, ranks: Ranks, error: Exception) -> None:
    kind = "" if isinstance(error, VeneerError) else f"{type(error).__name__}: "
    store.set(_key(ranks.rank), f"process {ranks.rank} of {ranks.world}: {kind}{error}")


def _told(store: dist.Store, ranks: Ranks) -> str | None:
    """What another process said of its failure, if one did."""
    with contextlib.suppress(RuntimeError):
        for rank in range(ranks.world):
            if rank != ranks.rank and store.check([_key(rank)]):
                return store.get(_key(rank)).decode()
    return None


def _leave() -> None:
    """Breaks the connection that the others wait on, so that they fail now and not when their patience ends."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        dist.group.WORLD.abort()  # to destroy it would wait for what is under way
    else:
        dist.destroy_process_group()


def _heard(store: dist.Store) -> bool:
    """Whether the first process has failed too, and so tells the user."""
    try:
        store.wait([_key(0)], HEARD)
    except RuntimeError:
        return False
    return True


def _key(rank: int) -> str:
    return f"veneer/failed/{rank}"
