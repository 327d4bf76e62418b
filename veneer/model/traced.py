"""What torch.compile sees of leaves: one operation for those that are fed the same x, with its gradients.

Legend: T tokens, I in, O out, R rank (of siblings together: their sum).

The eager leaf (`veneer.model.leaf`) reads spans, names and methods from the running stream: Python that would have to
be traced anew for every stream. Compiled layers run only where one slot speaks over a whole stream without dropout
(`Wiring.whole`). Inside the operation runs what the eager leaf runs (`veneer.kernels.lora`); the compiler sees factors
and activations, never the frozen weights, so it can neither keep a decoded weight for backward nor compile a layer
anew because its storage is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from veneer.kernels.gated import down, gate_and_up, gated_gradients
from veneer.kernels.lora import Piece, gradients, products
from veneer.methods.lora import LoRA
from veneer.model.unread import Unread

if TYPE_CHECKING:
    from veneer.model.leaf import Leaf

_NUMBERED: WeakValueDictionary[int, Leaf] = WeakValueDictionary()
_next = count()


def numbered(leaf: Leaf) -> Tensor:
    """A number for the leaf, as a tensor: by an int, each layer would be compiled anew."""
    number = next(_next)
    _NUMBERED[number] = leaf
    return torch.tensor(number, device="cpu")  # whatever the default device: it is read while a graph is recorded


def traced(leaf: Leaf, x: Tensor) -> Tensor:
    """The output (..., O) of `leaf` for x (..., I), while a layer is being compiled."""
    wiring, slot = leaf.wiring, leaf.wiring.whole
    if slot is None or slot not in leaf.slots:
        return _bare(leaf, x.reshape(-1, leaf.in_features)).view(*x.shape[:-1], leaf.out_features)
    if not isinstance(leaf.slots[slot], LoRA):
        return _by_delta(leaf, x, slot)
    family = _family(leaf, slot)
    if wiring.thin is None or wiring.thin[0] is not x:
        methods = [other.slots[slot] for other in family]
        factors = [tensor for method in methods for tensor in method.pair()]
        scales = [method.scale for method in methods]
        wiring.thin = (x, lora_family(x.reshape(-1, leaf.in_features), family[0].number, slot, factors, scales))
    outs = wiring.thin[1]
    place = next(i for i, other in enumerate(family) if other is leaf)
    if place == len(family) - 1:
        wiring.thin = None
    return outs[place].view(*x.shape[:-1], leaf.out_features)


def _family(leaf: Leaf, slot: str) -> list[Leaf]:
    """Those computed together with `leaf`, itself one of them."""
    siblings = [other for other in leaf.siblings if other.in_features == leaf.in_features]
    return [other for other in siblings if slot in other.slots and isinstance(other.slots[slot], LoRA)]


def _by_delta(leaf: Leaf, x: Tensor, slot: str) -> Tensor:
    x_TI = x.reshape(-1, leaf.in_features)
    y_TO = _bare(leaf, x_TI)
    bare_TO = y_TO if leaf.bias is None else y_TO - leaf.bias.to(y_TO.dtype)
    y_TO = y_TO + leaf.slots[slot].delta(x_TI, bare_TO, _Opaque(leaf))
    return y_TO.view(*x.shape[:-1], leaf.out_features)


class _Opaque:
    """A leaf's base as a method may ask of it while compiled: its product is one operation, whatever it stores."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf

    def matmul(self, x_TI: Tensor) -> Tensor:
        return frozen_product(x_TI, self.leaf.number, self.leaf.out_features)

    def row_norms(self) -> Tensor:
        return self.leaf.base.row_norms()


def _bare(leaf: Leaf, x_TI: Tensor) -> Tensor:
    """x W' + bias alone."""
    y_TO = frozen_product(x_TI, leaf.number, leaf.out_features)
    return y_TO if leaf.bias is None else y_TO + leaf.bias.to(y_TO.dtype)


@torch.library.custom_op(
    "veneer::frozen_product", mutates_args=(), schema="(Tensor x, Tensor number, int out) -> Tensor"
)
def frozen_product(x: Tensor, number: Tensor, out: int) -> Tensor:
    """x W' (T, O) of a leaf: as an operation, because the compiler would keep a decoded W for backward."""
    return _NUMBERED[int(number)].base.matmul(x)


@frozen_product.register_fake
def _(x: Tensor, number: Tensor, out: int) -> Tensor:
    return x.new_empty(x.shape[0], out)


@torch.library.custom_op(
    "veneer::frozen_product_backward", mutates_args=(), schema="(Tensor g, Tensor number, int inside) -> Tensor"
)
def frozen_product_backward(g: Tensor, number: Tensor, inside: int) -> Tensor:
    """g W (T, I)."""
    return _NUMBERED[int(number)].base.matmul_t(g.contiguous())


@frozen_product_backward.register_fake
def _(g: Tensor, number: Tensor, inside: int) -> Tensor:
    return g.new_empty(g.shape[0], inside)


def _keep_number(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, number, _ = inputs
    ctx.save_for_backward(number)
    ctx.inside = x.shape[1]


def _frozen_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    (number,) = ctx.saved_tensors
    return frozen_product_backward(g, number, ctx.inside), None, None


frozen_product.register_autograd(_frozen_backward, setup_context=_keep_number)


def _pieces(x_TI: Tensor, scales: list[float]) -> list[Piece]:
    return [Piece(0, len(x_TI), layer, scale, layer) for layer, scale in enumerate(scales)]


@torch.library.custom_op(
    "veneer::lora_family",
    mutates_args=(),
    schema="(Tensor x, Tensor number, str slot, Tensor[] factors, float[] scales) -> Tensor[]",
)
def lora_family(x: Tensor, number: Tensor, slot: str, factors: list[Tensor], scales: list[float]) -> list[Tensor]:
    """Outputs (T, O) of the leaves of a family, and then z = s x A' (T, R) of all."""
    leaf = _NUMBERED[int(number)]
    bases = leaf.wiring.operands(_family(leaf, slot))
    ys, zs = products(x, bases, _pieces(x, scales), factors)
    return [*ys, *zs]


@lora_family.register_fake
def _(x: Tensor, number: Tensor, slot: str, factors: list[Tensor], scales: list[float]) -> list[Tensor]:
    ranks = sum(a_RI.shape[0] for a_RI in factors[0::2])
    return [x.new_empty(x.shape[0], b_OR.shape[0]) for b_OR in factors[1::2]] + [x.new_empty(x.shape[0], ranks)]


@torch.library.custom_op(
    "veneer::lora_family_backward",
    mutates_args=(),
    schema="(Tensor[] gs, Tensor x, Tensor z, Tensor number, str slot, Tensor[] factors, float[] scales) -> Tensor[]",
)
def lora_family_backward(
    gs: list[Tensor], x: Tensor, z: Tensor, number: Tensor, slot: str, factors: list[Tensor], scales: list[float]
) -> list[Tensor]:
    """The gradient of x (T, I), and then of every factor."""
    bases = [leaf.base for leaf in _family(_NUMBERED[int(number)], slot)]
    dx, sums = gradients(gs, x, [z], bases, _pieces(x, scales), factors, True, [True] * len(factors))
    return [dx, *map(_own, sums)]


def _own(grad: Tensor) -> Tensor:
    """A contiguous tensor in memory of its own, as what an operation returns has to be."""
    alone = grad.is_contiguous() and grad.untyped_storage().nbytes() == grad.nbytes
    return grad if alone else grad.clone(memory_format=torch.contiguous_format)


@lora_family_backward.register_fake
def _(
    gs: list[Tensor], x: Tensor, z: Tensor, number: Tensor, slot: str, factors: list[Tensor], scales: list[float]
) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(factor) for factor in factors)]


def _keep(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, number, ctx.slot, factors, ctx.scales = inputs
    ctx.save_for_backward(x, output[-1], number, *factors)


def _backward(ctx: Any, gs: list[Tensor]) -> tuple[Any, ...]:
    x, z, number, *factors = ctx.saved_tensors
    dx, *sums = lora_family_backward(list(gs[:-1]), x, z, number, ctx.slot, factors, ctx.scales)
    return dx, None, None, sums, None


lora_family.register_autograd(_backward, setup_context=_keep)


def traced_mlp(leaves: Sequence[Leaf], slot: str, x: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x)) for x (..., D), of the leaves gate, up and down, while a layer is being compiled."""
    methods = [leaf.slots[slot] for leaf in leaves]
    factors = [tensor for method in methods for tensor in method.pair()]
    numbers, scales = [leaf.number for leaf in leaves], [method.scale for method in methods]
    y_TD = gated_mlp(x.reshape(-1, leaves[0].in_features), numbers, factors, scales)[0]
    return y_TD.view(*x.shape[:-1], leaves[2].out_features)


@torch.library.custom_op(
    "veneer::gated_mlp",
    mutates_args=(),
    schema="(Tensor x, Tensor[] numbers, Tensor[] factors, float[] scales) -> Tensor[]",
)
def gated_mlp(x: Tensor, numbers: list[Tensor], factors: list[Tensor], scales: list[float]) -> list[Tensor]:
    """y (T, D), and for backward the frozen products of gate and up (T, F), and z = s x A' (T, R) of both."""
    leaves = [_NUMBERED[int(number)] for number in numbers]
    wiring = leaves[0].wiring
    g_TF, u_TF, z_TR = gate_and_up(x, wiring.operands(leaves[:2]), factors, scales)
    [base] = wiring.operands(leaves[2:])
    y = base.matmul(x) if isinstance(base, Unread) else down(x, g_TF, u_TF, z_TR, base, factors, scales)
    return [y, g_TF, u_TF, z_TR]


@gated_mlp.register_fake
def _(x: Tensor, numbers: list[Tensor], factors: list[Tensor], scales: list[float]) -> list[Tensor]:
    a_gate, b_gate, a_up, b_up, _, b_down = factors
    widths = [b_down.shape[0], b_gate.shape[0], b_up.shape[0], a_gate.shape[0] + a_up.shape[0]]
    return [x.new_empty(x.shape[0], width) for width in widths]


@torch.library.custom_op(
    "veneer::gated_mlp_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor g, Tensor u, Tensor z, Tensor[] numbers, Tensor[] factors, float[] scales) "
    "-> Tensor[]",
)
def gated_mlp_backward(
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    u: Tensor,
    z: Tensor,
    numbers: list[Tensor],
    factors: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    """The gradient of x (T, D), and then of every factor."""
    bases = [_NUMBERED[int(number)].base for number in numbers]
    dx, grads = gated_gradients(dy.contiguous(), x, g, u, z, bases, factors, scales)
    return [dx, *map(_own, grads)]


@gated_mlp_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    u: Tensor,
    z: Tensor,
    numbers: list[Tensor],
    factors: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(factor) for factor in factors)]


def _keep_mlp(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, numbers, factors, ctx.scales = inputs
    ctx.save_for_backward(x, *output[1:], *numbers, *factors)


def _mlp_backward(ctx: Any, gs: list[Tensor]) -> tuple[Any, ...]:
    x, g, u, z, *rest = ctx.saved_tensors
    dx, *grads = gated_mlp_backward(gs[0], x, g, u, z, rest[:3], rest[3:], ctx.scales)
    return dx, [None] * 3, grads, None


gated_mlp.register_autograd(_mlp_backward, setup_context=_keep_mlp)
