"""Layers that are computed twice: their input is all that backward keeps, on the GPU or on the host.

Source: Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]
Around = Callable[[], AbstractContextManager[None]]
LEAVING = 2  # inputs on their way to the host at a time: the computation waits for the one before


def recomputed(hidden: Tensor, run: Layer, again: Layer, around: Around, shelf: Shelf | None, number: int) -> Tensor:
    """run(hidden), differentiable in hidden and in what `run` trains; in backward `again` runs in its place.

    around: makes a context for the second run and its backward.
    shelf: where layer `number` keeps its input; None: on the device.
    Nothing in a layer is random while a stream runs (dropout masks are functions of step and row), so the second run
    computes what the first did. Gradients of adapters are added where they live, by the inner backward.
    """
    return _Recompute.apply(hidden, run, again, around, shelf, number)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, run: Layer, again: Layer, around: Around, shelf: Shelf | None, number: int
    ) -> Tensor:
        ctx.again, ctx.around, ctx.shelf, ctx.number = again, around, shelf, number
        if shelf is None:
            ctx.save_for_backward(hidden)
        else:
            shelf.put(number, hidden)
        with torch.enable_grad():  # as in backward, so that a compiled layer is compiled once; the graph goes at once
            return run(hidden.detach().requires_grad_()).detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        hidden = ctx.saved_tensors[0] if ctx.shelf is None else ctx.shelf.take(ctx.number)
        hidden = hidden.detach().requires_grad_()
        with ctx.around():
            with torch.enable_grad():
                out = ctx.again(hidden)
            torch.autograd.backward(out, g)
        return hidden.grad, None, None, None, None, None


class Shelf:
    """Layer inputs in pinned host memory, copied there and back while the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self.side = torch.cuda.Stream(device)
        self.hosts: dict[int, Tensor] = {}
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self.shapes: dict[int, tuple[torch.Size, torch.dtype]] = {}

    def put(self, number: int, hidden: Tensor) -> None:
        """Starts to copy the input of layer `number` out."""
        self.shapes[number] = (hidden.shape, hidden.dtype)
        host = self._host(number, hidden)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            host.copy_(hidden.reshape(-1), non_blocking=True)
            self.leaving.append((hidden, self.side.record_event()))
        if len(self.leaving) > LEAVING:
            self._let_go()

    def take(self, number: int) -> Tensor:
        """The input of layer `number`; that of the one below starts to come."""
        while self.leaving:
            self._let_go()
        tensor, arrived = self.coming.pop(number) if number in self.coming else self._fetch(number)
        if number - 1 in self.shapes:
            self.coming[number - 1] = self._fetch(number - 1)
        torch.cuda.current_stream().wait_event(arrived)
        return tensor

    def _let_go(self) -> None:
        """Its memory may be used again once the copy is through."""
        tensor, left = self.leaving.popleft()
        torch.cuda.current_stream().wait_event(left)
        del tensor

    def _fetch(self, number: int) -> tuple[Tensor, torch.cuda.Event]:
        shape, dtype = self.shapes.pop(number)
        tensor = torch.empty(shape, dtype=dtype, device=self.side.device)
        self.side.wait_stream(torch.cuda.current_stream())  # what had this memory before has been computed
        with torch.cuda.stream(self.side):
            tensor.view(-1).copy_(self.hosts[number][: tensor.numel()], non_blocking=True)
            return tensor, self.side.record_event()

    def _host(self, number: int, hidden: Tensor) -> Tensor:
        held = self.hosts.get(number)
        if held is None or held.numel() < hidden.numel() or held.dtype != hidden.dtype:
            self.hosts[number] = torch.empty(hidden.numel(), dtype=hidden.dtype, pin_memory=True)
        return self.hosts[number][: hidden.numel()]
