"""What torch.compile sees of a leaf: one adapter over all rows, in plain products.

Legend: T tokens, I in, O out, R rank (of siblings together: their sum).

The eager leaf (`veneer.model.leaf`) reads spans, names and methods from the running stream: Python that would have to
be traced anew for every stream. Compiled layers run only where one slot speaks over a whole stream without dropout
(`Wiring.whole`); then all that is left of a leaf is this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.methods.lora import LoRA

if TYPE_CHECKING:
    from veneer.model.leaf import Leaf


def traced(leaf: Leaf, x: Tensor) -> Tensor:
    """The output (..., O) of `leaf` for x (..., I); siblings that are fed the same x share one product over it."""
    wiring = leaf.wiring
    slot = wiring.voice if wiring.stream is None else wiring.whole
    if slot is None or slot not in leaf.slots:
        return leaf.base.linear(x)
    method, x_TI = leaf.slots[slot], x.reshape(-1, leaf.in_features)
    y_TO = leaf.base.linear(x_TI)
    if isinstance(method, LoRA):
        b_OR = (method.b_OR * method.scale).to(x.dtype)
        y_TO = torch.addmm(y_TO, _thin(leaf, slot, x), b_OR.t())
    else:
        bare_TO = y_TO if leaf.bias is None else y_TO - leaf.bias.to(y_TO.dtype)
        y_TO = y_TO + method.delta(x_TI, bare_TO, leaf.base)
    return y_TO.view(*x.shape[:-1], leaf.out_features)


def _thin(leaf: Leaf, slot: str, x: Tensor) -> Tensor:
    """x A' of this leaf: its part of one product over x for all A of the family, made by the first that is called."""
    wiring, x_TI = leaf.wiring, x.reshape(-1, leaf.in_features)
    family = [other for other in leaf.siblings if slot in other.slots and isinstance(other.slots[slot], LoRA)]
    if len(family) == 1:
        return x_TI @ leaf.slots[slot].a_RI.to(x.dtype).t()
    if wiring.thin is None or wiring.thin[0] is not x:
        factors = [other.slots[slot].a_RI for other in family]
        z_TR = x_TI @ torch.cat(factors).to(x.dtype).t()
        wiring.thin = (x, z_TR.split([len(a_RI) for a_RI in factors], 1))
    parts = wiring.thin[1]
    number = [i for i, other in enumerate(family) if other is leaf][0]
    if number == len(family) - 1:
        wiring.thin = None
    return parts[number]
