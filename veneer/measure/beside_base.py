"""An adapter on its base: does it belong there, how large is each update beside its weight, what did it bring in.

Legend: E experts, I in, O out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter.attach import attach, detach, methods_of
from veneer.adapter.card import Adapter
from veneer.adapter.verify import check_base
from veneer.bases.base import Base
from veneer.errors import NotMergeable
from veneer.measure.intruders import intruders
from veneer.methods.base import Method
from veneer.model import fingerprint as fingerprints
from veneer.model.progress import shown
from veneer.model.swap import base_at
from veneer.model.vocabulary import embedding_path, head_path

SLOT = "inspected"


@dataclass(frozen=True)
class OnBase:
    """An adapter on a base that it belongs to.

    notes: what could not be checked. ratios: path of a layer -> ‖W' - W‖ / ‖W‖. intruders: path -> how many of the ten
    strongest directions of W' are like none of W's (of experts: of all of them together); not of embedding and head,
    and not where the method has no merged weight.
    """

    notes: tuple[str, ...]
    ratios: dict[str, float]
    intruders: dict[str, int]


def on_base(adapter: Adapter, model: nn.Module, progress: bool = False) -> OnBase:
    """The model is as it was afterwards. Raises WrongBaseError where the adapter does not belong on it."""
    notes = check_base(adapter, model, fingerprints.of(model))
    ends = (embedding_path(model), head_path(model))
    ratios, found = {}, {}
    attach(model, adapter, SLOT)
    try:
        methods = methods_of(model, SLOT)
        for path in shown(list(methods), "beside the base", progress):
            base = base_at(model, path)
            size = float(torch.linalg.vector_norm(base.row_norms()))
            ratios[path] = methods[path].update_norm(base) / size if size else float("inf")
            if path not in ends and (counted := _intruders(methods[path], base)) is not None:
                found[path] = counted
    finally:
        detach(model, SLOT)
    return OnBase(tuple(notes), ratios, found)


@torch.no_grad()
def _intruders(method: Method, base: Base) -> int | None:
    """None where there is no merged weight."""
    try:
        tuned = method.merged(base)
    except NotMergeable:
        return None
    weights, tuned = _each(base.dense()), _each(tuned)
    return sum(intruders(weight_OI, tuned_OI) for weight_OI, tuned_OI in zip(weights, tuned, strict=True))


def _each(weight: Tensor) -> Tensor:
    """(E, O, I): of a layer of experts each, of another the one."""
    return weight if weight.dim() == 3 else weight[None]
