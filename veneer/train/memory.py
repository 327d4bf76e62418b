"""A step that does not fit into memory: what it held, and what to lower by how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from veneer.bases.dense import Dense
from veneer.errors import NotEnoughMemoryError, listed
from veneer.train.job import Job
from veneer.train.ranks import Ranks

MANY = 2**28  # bytes of gradients that are worth an option
# How torch says it where it has no type of its own for it: the CPU's allocator, cuBLAS.
SIGNS = ("not enough memory", "DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def memory_explained(model: nn.Module, jobs: Sequence[Job], ranks: Ranks) -> Iterator[None]:
    """Inside, running out of memory raises NotEnoughMemoryError, which says what can be done."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        active = [job for job in jobs if not job.done]
        raise NotEnoughMemoryError(_explanation(model, active, ranks, error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the CPU or a GPU, has run out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def _explanation(model: nn.Module, jobs: Sequence[Job], ranks: Ranks, error: BaseException) -> str:
    held = [_held(job, ranks) for job in jobs]
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    steps = [step for job in jobs for step in _lower(job, len(jobs) > 1, ranks)] + _lower_base(model, ranks)
    return listed(
        "\n".join([f"out of memory: {said}", *held, "What takes less:"]),
        steps,
        "The last checkpoint stands: --resume goes on from it with smaller passes or with gradient checkpointing; "
        "anything else is another run.",
    )


def _held(job: Job, ranks: Ranks) -> str:
    """What the coming step holds."""
    passes = [ranks.share(job.rows(micro)) for micro in range(job.settings.gradient_accumulation_steps)]
    rows = max(passes, key=lambda rows: sum(len(example.input_ids) for example in rows))
    lengths = [len(example.input_ids) for example in rows]
    widths = sorted({method.rank for method in job.methods.values() if method.rank})
    width = f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else str(widths[0])
    asked = job.settings.gradient_checkpointing
    recompute = "on" if asked is True or (asked == "auto" and job.parted) else asked or "off"
    return (
        f"{job.slot}, step {job.step + 1} of {job.total}: up to {sum(lengths):,} tokens in a forward pass ({len(rows)} "
        f"rows, the longest {max(lengths, default=0):,}), adapters of rank {width}, recompute {recompute}"
    )


def _lower(job: Job, named: bool, ranks: Ranks) -> list[str]:
    """What to lower, the cheapest first."""
    settings, steps = job.settings, []
    size, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    if size > 1 and job.parted is None:
        smaller = max(part for part in range(1, size // 2 + 1) if size % part == 0)
        more = passes * (size // smaller)
        steps.append(
            f"--per-device-train-batch-size {smaller} --gradient-accumulation-steps {more} (now {size} and {passes}): "
            "the same step in smaller passes"
        )
    asked = settings.gradient_checkpointing
    recomputed = asked is True or job.parted is not None
    if asked is False or (asked == "auto" and not recomputed and not torch.cuda.is_available()):
        steps.append("--gradient-checkpointing: activations are computed twice instead of kept, a third slower")
    elif asked != "offload" and torch.cuda.is_available():
        steps.append("--gradient-checkpointing offload: what is kept of them lies on the host")
    alone = passes == 1 and asked is not False and not settings.fsdp and ranks.world == 1
    if 4 * len(job.flat) >= MANY and job.parted is None and alone:
        steps.append(
            f"--optimizer-in-bwd --max-grad-norm 0: gradients, now {4 * len(job.flat) / 2**30:.1f} GiB, are freed "
            "during backward"
        )
    longest = max(len(example.input_ids) for example in job.train)
    steps.append(f"--max-length {max(1, longest // 2)}: the longest row now has {longest:,} tokens")
    return [f"{job.slot}: {step}" for step in steps] if named else steps


def _lower_base(model: nn.Module, ranks: Ranks) -> list[str]:
    """How the base would take less."""
    steps = []
    if any(type(module) is Dense for module in model.modules()):
        steps.append("--load-in-4bit: the base takes a quarter of the memory of bfloat16")
    if (gpus := torch.cuda.device_count()) > 1 and ranks.world == 1:
        steps.append(f"torchrun --nproc-per-node {gpus} -m veneer.cli train ... --fsdp: the base shared by {gpus} GPUs")
    return steps
